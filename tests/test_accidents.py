"""Accidents and hostile input: what is on the disk is kept, and what cannot work is said by name, before the work."""

import errno
import json
import os
import socket
import stat
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from secateur import FormatError
from secateur.files import (
    INDEX,
    SINGLE,
    ModelDirectory,
    check_file,
    check_output,
    copy_all_but_weights,
    inspect,
    note_written,
    read_header,
    whole_directory,
    write_text,
)
from secateur.files import _rename as rename
from secateur.files import _source as source_files
from secateur.files import _temporary as temporary
from secateur.files import _whole as whole
from secateur.timing import MeasurementCache


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path / "model")


def make_model(path):
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "tokenizer.json").write_text("{}")
    save_file({"a": torch.ones(4, 4)}, path / SINGLE)
    return path


@pytest.fixture(params=["the system's renames", "two plain renames"])
def renames(request, monkeypatch):
    """With the renames of this system, and as on one that has only plain ones."""
    if request.param == "two plain renames":
        monkeypatch.setattr(rename, "_system_call", lambda: None)
    return request.param


def fill(path, text="new", overwrite=False, meanwhile=lambda: None):
    with whole_directory(path, overwrite=overwrite) as partial:
        (partial / "config.json").write_text(text)
        meanwhile()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# What appears at the output while files are written


def appear_file(path):
    path.write_text("years of work")


def appear_folder(path):
    path.mkdir()


def appear_notes(path):
    path.mkdir()
    (path / "thesis.txt").write_text("years of work")


def appear_model(path):
    path.mkdir()
    (path / "config.json").write_text("old")


def appear_link(path):
    path.symlink_to("nowhere")


APPEARANCES = [appear_file, appear_folder, appear_notes, appear_model, appear_link]


@pytest.mark.parametrize("appear", APPEARANCES)
def test_what_appears_while_files_are_written_is_kept(tmp_path, renames, appear):
    output = tmp_path / "out"
    appear(tmp_path / "expected")
    with pytest.raises(FormatError, match=r"(?s)out was made by something else.*is deleted.\nGive another directory"):
        fill(output, meanwhile=lambda: appear(output))
    assert names(tmp_path) == ["expected", "out"]
    assert output.is_symlink() == (appear is appear_link)
    assert output.is_dir() == (tmp_path / "expected").is_dir()
    if output.is_dir():
        assert names(output) == names(tmp_path / "expected")


@pytest.mark.parametrize("appear", APPEARANCES)
def test_what_is_there_already_is_kept(tmp_path, renames, appear):
    output = tmp_path / "out"
    appear(output)
    if appear is appear_link:
        fill(output)  # a link to nothing is followed: the place is free
        assert names(tmp_path) == ["nowhere", "out"]
        return
    with pytest.raises(FormatError, match="already exists"):
        fill(output)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("appear", [appear_file, appear_notes])
@pytest.mark.parametrize("when", ["before", "meanwhile", "in the last moment"])
def test_overwrite_replaces_models_only_whenever_something_else_appears(tmp_path, renames, monkeypatch, appear, when):
    output = tmp_path / "out"
    if when == "in the last moment":
        if renames == "two plain renames":
            pytest.skip("without an exchange there is no look after it")
        appear_model(output)
        exchange = whole.exchange

        def swap_in(new, place):
            if (output / "config.json").exists():  # once
                (output / "config.json").unlink()
                output.rmdir()
                appear(output)
            return exchange(new, place)

        monkeypatch.setattr(whole, "exchange", swap_in)
    if when == "before":
        appear(output)
    with pytest.raises(FormatError, match=r"is a file|something other than a model"):
        fill(output, overwrite=True, meanwhile=lambda: appear(output) if when == "meanwhile" else None)
    assert names(tmp_path) == ["out"]
    assert (output if appear is appear_file else output / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("there", [None, appear_folder, appear_model])
def test_overwrite_replaces_a_model_an_empty_folder_or_nothing(tmp_path, renames, there):
    output = tmp_path / "out"
    if there is not None:
        there(output)
    fill(output, overwrite=True)
    assert (output / "config.json").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_of_two_runs_to_one_output_one_says_that_it_wrote(tmp_path, renames):
    output = tmp_path / "out"
    with pytest.raises(FormatError, match="was made by something else"):
        fill(output, "first", meanwhile=lambda: fill(output, "second"))
    assert (output / "config.json").read_text() == "second"
    assert names(tmp_path) == ["out"]


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="no exchange of names")
def test_overwriting_is_one_exchange_and_no_name_is_ever_free(tmp_path, monkeypatch):
    output = tmp_path / "out"
    appear_model(output)
    for module, name in ((os, "rename"), (Path, "rename"), (whole, "rename_new")):
        monkeypatch.setattr(module, name, lambda *args: pytest.fail("a rename, which needs a free name"))
    fill(output, overwrite=True)
    assert (output / "config.json").read_text() == "new"


@pytest.mark.parametrize("number", sorted(rename._LACKING))
def test_a_file_system_that_lacks_the_calls_gets_plain_renames(tmp_path, monkeypatch, number):
    def lacking(path, target, flag):
        rename.ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(rename, "_system_call", lambda: lacking)
    fill(tmp_path / "out")
    fill(tmp_path / "out", "newer", overwrite=True)
    assert (tmp_path / "out" / "config.json").read_text() == "newer"
    assert names(tmp_path) == ["out"]


# Processes that died


def died(path, alive=False, **files):
    """Leave a temporary folder as a killed process does; the system gives its lock back."""
    locks = []
    folder = temporary.temporary_name(path)
    assert temporary._make_locked(folder, locks, path)
    for name, text in files.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(text)
    if not alive:
        os.close(locks[0])
    return folder, locks[0]


@pytest.mark.skipif(sys.platform == "win32", reason="no locks")
@pytest.mark.parametrize(
    "write", [fill, lambda path: write_text(path, "new"), check_file, lambda path: check_output(None, path, False, 0)]
)
def test_leftovers_of_dead_processes_are_swept_and_those_of_living_ones_kept(tmp_path, write):
    output = tmp_path / "out"
    died(output, new="half")
    died(output)
    inside, _ = died(output)
    (inside / ".tmpXhsF96").write_text("half")  # safetensors was writing, beside the file that it was given
    (tmp_path / ".out.01234567.partial").mkdir()  # killed before it was locked
    living, lock = died(output, alive=True, new="half")
    other, _ = died(tmp_path / "other", new="half")
    (tmp_path / ".out.76543210.partial").mkdir()
    (tmp_path / ".out.76543210.partial" / "thesis.txt").touch()  # not of ours
    write(output)
    os.close(lock)
    kept = {living.name, other.name, ".out.76543210.partial"}
    assert set(names(tmp_path)) - {"out"} == kept
    assert (living / "new" / "config.json").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no locks")
def test_an_output_that_had_stepped_aside_when_the_process_died_is_put_back(tmp_path, model):
    output = tmp_path / "out"
    died(output, old="old", new="new")
    with pytest.raises(FormatError, match="already exists"):
        check_output(model, output, False, 0)
    assert (output / "config.json").read_text() == "old"
    died(output, old="older", new="new")  # killed after the second rename: the user asked for it to be replaced
    check_output(model, output, True, 0)
    assert (output / "config.json").read_text() == "old"
    assert names(tmp_path) == ["model", "out"]


@pytest.mark.skipif(sys.platform == "win32", reason="no locks")
def test_only_the_path_whose_name_it_is_gets_an_old_output_back(tmp_path):
    path, alike = tmp_path / ("x" * 40 + "a"), tmp_path / ("x" * 40 + "b")
    died(path, old="old")
    temporary.sweep(alike)
    assert not alike.exists()
    temporary.sweep(path)
    assert names(tmp_path) == [path.name]


@pytest.mark.parametrize("back", [True, False])
def test_an_overwrite_that_fails_between_two_renames_loses_nothing(tmp_path, monkeypatch, back):
    monkeypatch.setattr(rename, "_system_call", lambda: None)
    output = tmp_path / "out"
    appear_model(output)

    def fail(path, target):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(whole, "rename_new", fail)
    if not back:
        monkeypatch.setattr(temporary, "rename_new", fail)
    with pytest.raises(FormatError, match="out could not be written: Input/output error"):
        fill(output, overwrite=True)
    monkeypatch.undo()
    assert output.exists() == back
    temporary.sweep(output)
    assert (output / "config.json").read_text() == "old"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("step", ["shutil.rmtree", "os.close", "pathlib.Path.rmdir"])
def test_an_interrupt_while_it_is_cleaned_up_waits_until_nothing_is_left(tmp_path, monkeypatch, step):
    output = tmp_path / "out"
    appear_model(output)
    struck = []
    name, _, attribute = step.rpartition(".")
    owner = {"shutil": temporary.shutil, "os": os, "pathlib.Path": Path}[name]
    usual = getattr(owner, attribute)

    def strike(*args):
        if not struck and (output / "config.json").read_text() == "new":  # once, after the last rename
            struck.append(True)
            raise KeyboardInterrupt
        return usual(*args)

    monkeypatch.setattr(owner, attribute, strike)
    with pytest.raises(KeyboardInterrupt):
        fill(output, overwrite=True)
    monkeypatch.undo()
    assert struck
    assert names(tmp_path) == ["out"]
    assert (output / "config.json").read_text() == "new"


def test_an_interrupt_while_a_place_is_tried_leaves_nothing(tmp_path, monkeypatch):
    mkdir = Path.mkdir

    def made_but_interrupted(path, *args, **keep):
        mkdir(path, *args, **keep)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "mkdir", made_but_interrupted)
    with pytest.raises(KeyboardInterrupt):
        check_file(tmp_path / "page.html")
    assert names(tmp_path) == []


def test_folders_that_were_made_on_the_way_are_removed_if_nothing_is_written(tmp_path):
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "a" / "b" / "out", meanwhile=stop)
    assert names(tmp_path) == []
    (tmp_path / "a").mkdir()
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "a" / "b" / "out", meanwhile=stop)
    assert names(tmp_path) == ["a"]


def test_what_was_written_is_told_by_the_disk(tmp_path, renames):
    output, page = tmp_path / "out", tmp_path / "page.html"
    with note_written() as written:
        write_text(page, "first")
        assert written() == [page]
        with whole_directory(output) as partial:
            write_text(partial / "config.json", "{}")
            assert written() == [page]
        assert written() == [page, output]
        fill(output, overwrite=True)
        assert written() == [page, output]
        with pytest.raises(FormatError):
            fill(tmp_path / "other", meanwhile=lambda: appear_notes(tmp_path / "other"))
        assert written() == [page, output]
        page.unlink()
        assert written() == [output]
    with note_written() as written:
        assert written() == []


@pytest.mark.parametrize("name", ["out", "o'u\"t", "o\\ut", "o\nut", "ö\N{SNOWMAN}"])
def test_no_message_has_a_temporary_name(tmp_path, monkeypatch, name):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(whole, "_flush", full)
    output = tmp_path / name
    for write in (lambda: fill(output), lambda: write_text(output, "x")):
        with pytest.raises(FormatError) as refused:
            write()
        assert "partial" not in str(refused.value)
        assert str(refused.value).startswith(f"{output}")
    with pytest.raises(FormatError) as refused, whole_directory(output) as made:
        write_text(made / "inner", "x")
    assert str(refused.value).startswith(f"{output / 'inner'} could not be written: No space left on device.\n")


# Measurements that several processes keep in one file


def cache(path):
    return MeasurementCache(path, {"cpu": "x"}, float, float)


def test_caches_that_are_saved_in_turn_lose_no_entries(tmp_path):
    path = tmp_path / "cache.json"
    first, second = cache(path), cache(path)
    first.put("a", 1.0)
    second.put("b", 2.0)
    first.save()
    second.save()
    first.put("c", 3.0)
    first.save()
    assert {key: cache(path)._own.get(key) for key in "abc"} == {"a": 1.0, "b": 2.0, "c": 3.0}
    assert names(tmp_path) == ["cache.json"]


@pytest.mark.skipif(sys.platform == "win32", reason="no locks")
def test_caches_that_are_saved_at_the_same_time_lose_no_entries(tmp_path):
    path = tmp_path / "cache.json"
    barrier = threading.Barrier(4)

    def work(worker):
        own = cache(path)
        barrier.wait()
        for number in range(15):
            own.put(f"{worker} {number}", 1.0)
            own.save()

    workers = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(cache(path)._own) == 60
    assert names(tmp_path) == ["cache.json"]


def test_a_cache_that_became_something_else_is_kept(tmp_path):
    path = tmp_path / "cache.json"
    own = cache(path)
    own.put("a", 1.0)
    path.write_text("thesis")
    with pytest.raises(FormatError, match="not an autotune cache"):
        own.save()
    assert path.read_text() == "thesis"


# Places that cannot be written: said before the work


@pytest.fixture
def place():
    """A folder of a user without privileges, who this process is while the test runs."""
    with tempfile.TemporaryDirectory() as name:
        root = os.geteuid() == 0
        if root:
            os.chown(name, 65534, 65534)
            os.seteuid(65534)
        try:
            yield Path(name)
        finally:
            for folder, folders, _ in os.walk(name):
                for inner in folders:
                    Path(folder, inner).chmod(0o700)
            if root:
                os.seteuid(0)


def loop(place):
    (place / "loop").symlink_to("loop")
    return place / "loop"


def below_a_loop(place):
    return loop(place) / "x"


def below_a_file(place):
    (place / "file").touch()
    return place / "file" / "x"


def no_permission(place):
    (place / "closed").mkdir(mode=0o500)
    return place / "closed" / "x"


def invisible(place):
    (place / "closed").mkdir(mode=0o000)
    return place / "closed" / "deeper" / "x"


def refusing_system(place):
    return Path("/proc/x/y")


PLACES = {
    "loop": loop,
    "below a loop": below_a_loop,
    "below a file": below_a_file,
    "no permission": no_permission,
    "invisible": invisible,
    "the system refuses": refusing_system,
    "long name": lambda place: place / ("x" * 300),
    "long name in bytes": lambda place: place / ("\N{SNOWMAN}" * 100),
    "long name of a missing folder": lambda place: place / "missing" / ("x" * 300) / "x",
    "long path": lambda place: place.joinpath(*["x" * 200] * 21),
}


@pytest.mark.skipif(sys.platform != "linux", reason="limits and errors of Linux")
@pytest.mark.parametrize("kind", PLACES)
def test_places_that_cannot_be_written_are_refused_before_and_at_the_writing(place, kind):
    path = PLACES[kind](place)
    before = sorted(place.iterdir())
    for check in (lambda: check_output(None, path, False, 0), lambda: check_output(None, path, True, 0)):
        with pytest.raises(FormatError, match=r"cannot be made: "):
            check()
    for check in (lambda: check_file(path), lambda: cache(path)):
        with pytest.raises(FormatError, match=r"cannot be made: "):
            check()
    for write in (lambda: write_text(path, "x"), lambda: fill(path), lambda: fill(path, overwrite=True)):
        with pytest.raises(FormatError, match=r"could not be written: "):
            write()
    assert sorted(place.iterdir()) == before


def test_a_file_is_not_written_over_a_directory_or_in_the_way_of_the_output(tmp_path):
    output = tmp_path / "out"
    check_file(output / "report.html", output)
    for wrong in (
        lambda: check_file(tmp_path),
        lambda: check_file(output, output),
        lambda: check_file(tmp_path / "page.html", tmp_path / "page.html" / "out"),
        lambda: check_file(output / "cache.json", output, inside=False),
    ):
        with pytest.raises(FormatError, match=r"another file|the path of a file"):
            wrong()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="no regular file"):
        check_file(tmp_path / "pipe")
    check_file(tmp_path / "deep" / "page.html", output)
    assert names(tmp_path) == ["pipe"]


def test_an_output_that_may_not_be_moved_is_refused_before_the_work(place):
    output = place / "out"
    appear_model(output)
    output.chmod(0o555)
    with pytest.raises(FormatError, match="cannot be replaced"):
        check_output(None, output, True, 0)


# Model directories that cannot be read or copied


def closed_file(model):
    (model / "merges.txt").touch(mode=0o000)
    return "merges.txt cannot be read: Permission denied"


def closed_folder(model):
    (model / "extra").mkdir(mode=0o000)
    return "extra cannot be read: Permission denied"


def dead_link(model):
    (model / "gone").symlink_to("nowhere")
    return "gone is a link to nothing"


def link_to_itself(model):
    (model / "loop").symlink_to("loop")
    return "loop is a link to nothing"


def folder_link(model):
    (model / "linked").symlink_to(model.parent, target_is_directory=True)
    return "linked is a link to a directory"


def pipe(model):
    os.mkfifo(model / "tokenizer.model")
    return "tokenizer.model is a named pipe, not a file"


def device_link(model):
    (model / "vocab.txt").symlink_to("/dev/zero")
    return "vocab.txt is a device, not a file"


def unix_socket(model):
    here = Path.cwd()
    os.chdir(model)  # the path of a socket has a small limit
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind("chat.sock")
    finally:
        os.chdir(here)
    return "chat.sock is a socket, not a file"


def too_many_bytes(model):
    with (model / "notes.txt").open("wb") as file:
        file.truncate(2 << 40)  # takes no space, but its copy would
    return "files that are no weights, and they would be copied; at most 1,073,741,824"


SOURCES = [closed_file, closed_folder, dead_link, link_to_itself, folder_link, pipe, device_link, unix_socket]
SOURCES += [too_many_bytes]


@pytest.mark.skipif(sys.platform == "win32", reason="permissions and special files of POSIX")
@pytest.mark.parametrize("spoil", SOURCES)
def test_files_that_cannot_be_copied_are_named_before_the_work(place, spoil):
    model = make_model(place / "model")
    message = spoil(model)
    with pytest.raises(FormatError) as refused:
        check_output(model, place / "out", False, 0)
    assert message in str(refused.value)


def test_too_many_files_are_said(model, tmp_path, monkeypatch):
    monkeypatch.setattr(source_files, "_MOST_FILES", 3)
    check_output(model, tmp_path / "out", False, 0)
    (model / "one more").touch()
    with pytest.raises(FormatError, match="has more than 3 files"):
        check_output(model, tmp_path / "out", False, 0)


def test_the_files_beside_the_weights_need_space_too(model, tmp_path, monkeypatch):
    (model / "notes.txt").write_bytes(b"x" * 1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1500})())
    check_output(model, tmp_path / "out", False, 400)
    with pytest.raises(FormatError, match=r"needs 1,6\d\d bytes, but the disk has 1,500"):
        check_output(model, tmp_path / "out", False, 600)


def test_links_out_of_the_directory_are_named_but_not_those_within_or_into_a_download_cache(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("private")
    model = make_model(tmp_path / "model")
    (model / "copy.json").symlink_to("tokenizer.json")
    (model / "weights").mkdir()
    check_output(model, tmp_path / "out", False, 0)
    (model / "vocab.txt").symlink_to(secret)
    with pytest.warns(UserWarning, match=rf"links that lead out of it.*vocab\.txt -> {secret}"):
        check_output(model, tmp_path / "out", False, 0)

    cached = tmp_path / "models--a--b"
    (cached / "snapshots").mkdir(parents=True)
    snapshot = make_model(cached / "snapshots" / "0123")
    (cached / "blobs").mkdir()
    (snapshot / "tokenizer.json").rename(cached / "blobs" / "abc")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/abc")
    check_output(snapshot, tmp_path / "out", False, 0)
    (snapshot / "vocab.txt").symlink_to(secret)
    with pytest.warns(UserWarning, match=r"vocab\.txt"):
        check_output(snapshot, tmp_path / "out", False, 0)


def test_a_file_that_grows_while_it_is_copied_does_not_fill_the_disk(model, tmp_path, monkeypatch):
    (model / "log.txt").write_bytes(b"x" * 100)
    checked = source_files._status_of

    def grow_after(path):
        status = checked(path)
        if path.name == "log.txt":
            path.write_bytes(b"x" * 5_000_000)
        return status

    monkeypatch.setattr(source_files, "_status_of", grow_after)
    (tmp_path / "out").mkdir()
    copy_all_but_weights(model, tmp_path / "out", ())
    assert (tmp_path / "out" / "log.txt").stat().st_size == 100
    assert names(tmp_path / "out") == ["config.json", "log.txt", "tokenizer.json"]


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")
@pytest.mark.parametrize("name", [SINGLE, "config.json", ""])
def test_what_may_not_be_read_is_not_called_missing(place, name):
    model = make_model(place / "model")
    (model / name).chmod(0o000)
    with pytest.raises(FormatError, match="cannot be read: Permission denied"):
        ModelDirectory.open(model)
    with pytest.raises(FormatError, match="cannot be read: Permission denied"):
        list(inspect(model / SINGLE if name == "config.json" else model)) if name != "config.json" else (
            read_header(model / "config.json")
        )
    (model / name).chmod(0o700)


@pytest.mark.parametrize("name", [SINGLE, "config.json", INDEX])
def test_nobody_waits_for_a_pipe(model, name):
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    with pytest.raises(FormatError, match="neither a file nor a directory"):
        ModelDirectory.open(model)
    for read in (lambda: list(inspect(model / name)), lambda: read_header(model / name)):
        with pytest.raises(FormatError, match=r"no regular file|neither a file"):
            read()


@pytest.mark.parametrize("shard", ["x" * 300 + ".safetensors", "\0.safetensors"])
def test_an_index_with_an_impossible_name(model, shard):
    (model / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(FormatError, match=r"cannot be read|names the file"):
        ModelDirectory.open(model)


# Dtypes of few bits


def write_raw(path, dtype, shape, content):
    header = json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(content)]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content)


@pytest.mark.parametrize("dtype", ["F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F16", "F64"])
def test_every_dtype_of_floating_point_that_pytorch_has_is_read(tmp_path, dtype):
    path = tmp_path / "m.safetensors"
    write_raw(path, dtype, [2, {"F16": 4, "F64": 1}.get(dtype, 8)], bytes(16))
    (found,) = inspect(path)
    assert found.sparsity == (0 if dtype == "F8_E8M0" else 1)  # which holds powers of two only


def test_a_whole_file_is_replaced_in_one_step_and_is_private_to_nobody(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o640)
    with whole.whole_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert stat.S_IMODE(partial.parent.stat().st_mode) == 0o700  # what is not complete is nobody else's
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
