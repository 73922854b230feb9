import json
import os
import shutil
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur import FormatError
from secateur.files import (
    INDEX,
    SINGLE,
    ModelDirectory,
    check_output,
    read_header,
    whole_directory,
    write_safetensors,
    write_text,
)


@pytest.fixture
def single(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "hidden_size": 4}')
    (path / "tokenizer.json").write_text("{}")
    (path / "nested").mkdir()
    (path / "nested" / "config.json").write_text("{}")
    (path / "pytorch_model.bin").write_bytes(b"stale dense weights")
    tensors = {"a.weight": torch.arange(16.0).view(4, 4), "half": torch.ones(3, dtype=torch.float16)}
    save_file(tensors, path / SINGLE, metadata={"format": "pt"})
    return path


@pytest.fixture
def sharded(tmp_path):
    path = tmp_path / "sharded"
    path.mkdir()
    (path / "config.json").write_text("{}")
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    save_file({"a": torch.ones(4, 4)}, path / names[0])
    save_file({"b": torch.ones(4, 4, dtype=torch.bfloat16)}, path / names[1])
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"a": names[0], "b": names[1]}}))
    return path


def test_write_replaces_what_is_asked_and_copies_the_rest(single, tmp_path):
    output = tmp_path / "new" / "out"
    replaced = {"a.weight": torch.zeros(4, 4, dtype=torch.float64)}
    ModelDirectory.open(single).write_pruned(output, replaced, {"config.json": '{"x": 1}', "secateur.json": "{}"})
    written = load_file(output / SINGLE)
    assert written["a.weight"].dtype == torch.float32
    assert not written["a.weight"].any()
    assert torch.equal(written["half"], torch.ones(3, dtype=torch.float16))
    files = sorted(path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file())
    assert files == ["config.json", SINGLE, "nested/config.json", "secateur.json", "tokenizer.json"]
    assert (output / "config.json").read_text() == '{"x": 1}'
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    assert stat.S_IMODE((output / SINGLE).stat().st_mode) == stat.S_IMODE((single / SINGLE).stat().st_mode)


def test_write_keeps_shards_dtypes_and_untouched_bytes(sharded, tmp_path):
    output = tmp_path / "out"
    ModelDirectory.open(sharded).write_pruned(output, {"b": torch.zeros(4, 4)}, {})
    assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in sharded.iterdir())
    assert (output / INDEX).read_bytes() == (sharded / INDEX).read_bytes()
    written = load_file(output / "model-00002-of-00002.safetensors")["b"]
    assert written.dtype == torch.bfloat16
    assert not written.any()
    assert torch.equal(load_file(output / "model-00001-of-00002.safetensors")["a"], torch.ones(4, 4))


def test_existing_output_needs_overwrite_and_is_then_replaced_whole(single, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text("{}")
    (output / "old").write_text("old")
    directory = ModelDirectory.open(single)
    with pytest.raises(FormatError, match=r"already exists.*--overwrite"):
        directory.write_pruned(output, {}, {})
    assert (output / "old").exists()
    directory.write_pruned(output, {}, {}, overwrite=True)
    assert not (output / "old").exists()
    assert (output / SINGLE).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_source_is_never_overwritten(single, overwrite):
    with pytest.raises(FormatError):
        ModelDirectory.open(single).write_pruned(single, {}, {}, overwrite=overwrite)
    with pytest.raises(FormatError):
        ModelDirectory.open(single).write_pruned(single.parent, {}, {}, overwrite=overwrite)
    assert (single / SINGLE).exists()


def test_a_full_disk_leaves_nothing_and_keeps_the_old(single, tmp_path, monkeypatch):
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text("{}")
    (output / "old").write_text("old")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("secateur.files._whole.save_file", full)
    with pytest.raises(FormatError, match="disk is full") as refused:
        ModelDirectory.open(single).write_pruned(output, {}, {}, overwrite=True)
    assert str(refused.value).startswith(f"{output / SINGLE} could not be written")  # not a temporary name
    assert "partial" not in str(refused.value)
    assert sorted(path.name for path in output.iterdir()) == ["config.json", "old"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_an_interrupt_while_writing_leaves_nothing(tmp_path):
    def fill():
        with whole_directory(tmp_path / "out") as partial:
            (partial / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_too_small_a_disk_is_said_before_any_work(single, tmp_path):
    with pytest.raises(FormatError, match="Free some space"):
        check_output(single, tmp_path / "out", False, 1 << 60)


def test_output_that_is_a_file_or_beneath_one(single, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(FormatError, match="is a file"):
        check_output(single, file, True, 0)
    with pytest.raises(FormatError, match="not a directory that you may write"):
        check_output(single, file / "out", False, 0)


def test_missing_or_wrong_sources(tmp_path, single):
    with pytest.raises(FormatError, match="does not exist"):
        ModelDirectory.open(tmp_path / "nowhere")
    with pytest.raises(FormatError, match="is a file, not a directory"):
        ModelDirectory.open(single / SINGLE)
    with pytest.raises(FormatError, match=r"no config\.json"):
        ModelDirectory.open(tmp_path)
    (single / SINGLE).unlink()
    with pytest.raises(FormatError, match=r"(?s)pytorch_model\.bin, a pickle.*save_pretrained") as refused:
        ModelDirectory.open(single)
    assert "safetensors only" in str(refused.value)
    (single / "pytorch_model.bin").unlink()
    with pytest.raises(FormatError, match="no weights"):
        ModelDirectory.open(single)


@pytest.mark.parametrize("content", ["", "[]", "{", "null", "\ud800".encode("utf-8", "surrogatepass")])
def test_config_that_is_no_json_object(single, content):
    (single / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FormatError, match="JSON"):
        ModelDirectory.open(single)


@pytest.mark.parametrize("shard", ["../model/model.safetensors", "/etc/passwd", "x.bin", "", "..", 3, None])
def test_index_that_names_files_elsewhere(sharded, shard):
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(FormatError):
        ModelDirectory.open(sharded)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": 3}, {"weight_map": {"a": "no.safetensors"}}])
def test_index_that_cannot_be_right(sharded, index):
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(FormatError):
        ModelDirectory.open(sharded)


@pytest.mark.parametrize("size", [0, 7, 8, 60])
def test_truncated_weights(single, size):
    os.truncate(single / SINGLE, size)
    with pytest.raises(FormatError, match="not a readable safetensors file"):
        ModelDirectory.open(single)


def test_tensor_in_two_shards(sharded):
    save_file({"a": torch.ones(4, 4)}, sharded / "model-00002-of-00002.safetensors")
    with pytest.raises(FormatError, match="in both"):
        ModelDirectory.open(sharded)


def test_find_tells_by_value_across_prefixes(single):
    directory = ModelDirectory.open(single)
    weight = torch.arange(16.0).view(4, 4)
    assert directory.find("a.weight", weight) == "a.weight"
    assert directory.find("model.a.weight", weight) == "a.weight"
    assert directory.find("weight", weight.double()) == "a.weight"
    assert directory.find("a.weight", weight + 1) is None
    assert directory.find("b.weight", weight) is None


def test_the_very_name_wins_over_a_copy_under_a_longer_one(single):
    weight = torch.tensor([[1.0, float("nan")]])
    save_file({"ema.w.weight": weight.clone(), "w.weight": weight}, single / SINGLE)
    assert ModelDirectory.open(single).find("w.weight", weight) == "w.weight"


def test_weights_of_other_modules_in_folders_are_copied(single, tmp_path):
    save_file({"linear.weight": torch.ones(2, 2)}, single / "nested" / SINGLE)
    ModelDirectory.open(single).write_pruned(tmp_path / "out", {}, {})
    assert load_file(tmp_path / "out" / "nested" / SINGLE)["linear.weight"].all()


def test_an_output_inside_the_source_or_with_an_impossible_name(single, tmp_path):
    with pytest.raises(FormatError, match="inside the model"):
        check_output(single, single / "out", False, 0)
    with pytest.raises(FormatError, match="cannot be made: File name too long"):
        check_output(single, tmp_path / ("x" * 300), False, 0)


def test_overwriting_through_a_link_leaves_nothing_aside(single, tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    ModelDirectory.open(single).write_pruned(tmp_path / "link", {}, {}, overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target" / SINGLE).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "model", "target"]


@pytest.mark.parametrize(("name", "content"), [(INDEX, '{"weight_map": {"a": ["x"]}}'), ("config.json", "[" * 100_000)])
def test_json_of_the_wrong_form(single, name, content):
    (single / name).write_text(content)
    with pytest.raises(FormatError, match=name):
        ModelDirectory.open(single)


def fill_text(path):
    write_text(path, "new")


def fill_tensors(path):
    write_safetensors(path, {"a": torch.ones(3)}, {"by": "test"})


def fill_directory(path):
    with whole_directory(path, overwrite=True) as partial:
        (partial / "folder").mkdir()
        (partial / "folder" / "file").write_text("new")


def old(path, write):
    """Put something at the path that the writer replaces."""
    path.mkdir() if write is fill_directory else path.write_text("old")


WRITERS = [fill_text, fill_tensors, fill_directory]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_what_is_new_has_the_usual_mode_and_folders_are_made(tmp_path, write, umask):
    path = tmp_path / "a" / "b"
    before = os.umask(umask)
    try:
        write(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~umask
    assert [entry.name for entry in path.parent.iterdir()] == ["b"]


@pytest.mark.parametrize("write", WRITERS)
def test_what_is_replaced_keeps_its_mode_and_links_to_it(tmp_path, write):
    path, link = tmp_path / "path", tmp_path / "link"
    old(path, write)
    path.chmod(0o750)
    link.symlink_to(path)
    write(link)
    assert link.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o750
    assert list(path.iterdir()) if path.is_dir() else path.read_bytes() != b"old"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link", "path"]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("step", ["flush", "rename"])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, write, exists, step):
    path = tmp_path / "path"
    if exists:
        old(path, write)

    def fail(*args):
        raise OSError(28, "No space left on device")

    new = "rename_new" if not exists else "exchange"
    rename = f"secateur.files._whole.{new}" if write is fill_directory else "os.replace"
    monkeypatch.setattr("os.fsync" if step == "flush" else rename, fail)
    rest = "The old path is as it was" if exists else "Nothing was left behind"
    with pytest.raises(FormatError, match=rf"(?s)path could not be written: .*No space.*disk is full.*{rest}"):
        write(path)
    monkeypatch.undo()
    assert [entry.name for entry in tmp_path.iterdir()] == ["path"][:exists]
    if exists:
        assert not list(path.iterdir()) if path.is_dir() else path.read_text() == "old"


@pytest.mark.parametrize("write", WRITERS)
def test_places_that_cannot_be_written(tmp_path, write):
    (tmp_path / "file").touch()
    write(tmp_path / ("x" * 250))  # a name that is just allowed, however long that of the temporary file
    (tmp_path / ("x" * 250)).rename(tmp_path / "written")
    for path in (tmp_path / "file" / "path", tmp_path / ("x" * 300)):
        with pytest.raises(FormatError, match=r"could not be written.*\nCheck the path"):
            write(path)
    assert {entry.name for entry in tmp_path.iterdir()} == {"file", "written"}


def test_what_is_written_is_read_back(tmp_path):
    write_text(tmp_path / "text", "\N{SNOWMAN}\n")
    assert (tmp_path / "text").read_bytes() == "\N{SNOWMAN}\n".encode()
    fill_tensors(tmp_path / "tensors")
    assert load_file(tmp_path / "tensors")["a"].tolist() == [1, 1, 1]
    assert read_header(tmp_path / "tensors") == ({"a"}, {"by": "test"})
    fill_directory(tmp_path / "directory")
    assert (tmp_path / "directory" / "folder" / "file").read_text() == "new"


def test_overwrite_deletes_nothing_but_a_model(single, tmp_path):
    notes = tmp_path / "notes"
    notes.mkdir()
    ModelDirectory.open(single).write_pruned(notes, {}, {}, overwrite=True)  # empty: nothing to lose
    shutil.rmtree(notes)
    notes.mkdir()
    (notes / "thesis.txt").write_text("years of work")
    with pytest.raises(FormatError, match="something other than a model"):
        ModelDirectory.open(single).write_pruned(notes, {}, {}, overwrite=True)
    assert (notes / "thesis.txt").exists()


def test_links_that_lead_nowhere_or_to_directories_are_said_before_any_work(single, tmp_path):
    (single / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FormatError, match="link to nothing"):
        check_output(single, tmp_path / "out", False, 0)
    (single / "gone").unlink()
    (single / "linked").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(FormatError, match="link to a directory"):
        check_output(single, tmp_path / "out", False, 0)


def test_linked_files_are_copied(single, tmp_path):
    """As in a download cache, where every file is a link."""
    (single / SINGLE).rename(tmp_path / "blob")
    (single / SINGLE).symlink_to(tmp_path / "blob")
    output = tmp_path / "out"
    ModelDirectory.open(single).write_pruned(output, {}, {})
    assert not (output / SINGLE).is_symlink()
    assert torch.equal(load_file(output / SINGLE)["a.weight"], torch.arange(16.0).view(4, 4))


def test_the_widest_dtype_is_that_of_the_tensors(single, sharded):
    assert ModelDirectory.open(single).widest_dtype == torch.float32
    assert ModelDirectory.open(sharded).widest_dtype == torch.float32
