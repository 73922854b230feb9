"""The folder of work in progress: one process at a time, work found again only for the same facts, nothing lost."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from secateur import FormatError, RecipeError
from secateur.files import hash_files, note_written, whole_directory, work_folder, work_path

FACTS = {"model": "a", "settings": "b"}


def step_of(output, name="shrink", facts=FACTS, restart=False, finish=None):
    with work_folder(output, restart=restart) as work:
        step = work.step(name, facts)
        if finish is not None:
            step.finish(finish)
    return step


def test_a_step_is_found_again_only_for_the_same_facts(tmp_path):
    out = tmp_path / "out"
    first = step_of(out)
    assert (first.done, first.changed, first.number) == (False, (), 1)
    assert first.path.parent == work_path(out) == tmp_path / "out.work"
    assert first.path.name.startswith("01-shrink-")
    assert not step_of(out, finish={"figure": 2}).done  # found, but not done before
    again = step_of(out)
    assert (again.path, again.done, again.changed, dict(again.record)) == (first.path, True, (), {"figure": 2})
    other = step_of(out, facts={"model": "a", "settings": "c", "seed": "1"})
    assert other.path != first.path
    assert (other.done, other.changed) == (False, ("seed", "settings"))
    assert step_of(out, facts={"model": "a", "settings": "c"}).changed == ("seed",)  # of the latest one, not the first
    assert step_of(out).done  # what was done before stays
    assert not out.exists()


def test_the_record_is_there_when_finish_returns(tmp_path):
    with work_folder(tmp_path / "out") as work:
        step = work.step("shrink", FACTS)
        with pytest.raises(FormatError, match="record"):
            _ = step.record
        step.finish({"a": 1})
        assert dict(step.record) == {"a": 1}
        step.finish({"a": 2})
        assert dict(step.record) == {"a": 2}


def test_a_step_is_found_at_another_number(tmp_path):
    with work_folder(tmp_path / "out") as work:
        first = work.step("recover", FACTS)
        first.finish()
    with work_folder(tmp_path / "out") as work:
        assert work.step("evaluate", FACTS).changed == ()
        moved = work.step("recover", FACTS)
    assert (moved.done, moved.path, moved.number) == (True, first.path, 2)


def test_steps_of_one_name_are_compared_with_those_of_their_number(tmp_path):
    for seed in "12":
        with work_folder(tmp_path / "out") as work:
            first, second = work.step("recover", {"seed": "0"}), work.step("recover", {"seed": seed})
    assert first.changed == ()
    assert second.changed == ("seed",)


def test_restart_ignores_earlier_work_and_keeps_it(tmp_path):
    first = step_of(tmp_path / "out", finish={})
    second = step_of(tmp_path / "out", restart=True)
    assert second.path != first.path
    assert (second.done, second.changed) == (False, ())
    assert first.path.is_dir()
    assert step_of(tmp_path / "out", finish={}).path == second.path  # without --restart, the latest one goes on
    assert step_of(tmp_path / "out").done


@pytest.mark.parametrize("name", ["", "Shrink", "../up", "a/b", "1a", "a" * 41, "a\0"])
def test_names_of_steps_are_checked(tmp_path, name):
    with work_folder(tmp_path / "out") as work, pytest.raises(RecipeError, match="name of a step"):
        work.step(name, FACTS)


@pytest.mark.parametrize(("name", "facts"), [(3, FACTS), ("shrink", {"seed": 3})])
def test_wrong_types_are_refused(tmp_path, name, facts):
    with work_folder(tmp_path / "out") as work, pytest.raises(TypeError):
        work.step(name, facts)


# One process at a time

HOLD = """
import sys
from secateur.files import work_folder
with work_folder(sys.argv[1]) as work:
    step = work.step("shrink", {"model": "a", "settings": "b"})
    print(step.path, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has the folder, and the path of its step."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process, process.stdout.readline().strip()
        process.kill()


def test_only_one_process_has_the_folder(tmp_path, holder):
    process, _ = holder
    with pytest.raises(FormatError, match=rf"out\.work is in use by another process \({process.pid}\)"):
        step_of(tmp_path / "out")
    step_of(tmp_path / "other")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_system_gives_the_folder_back(tmp_path, holder, how):
    process, path = holder
    process.send_signal(how)
    process.wait()
    step = step_of(tmp_path / "out")
    assert (str(step.path), step.done) == (path, False)


def test_one_process_cannot_have_it_twice(tmp_path):
    with work_folder(tmp_path / "out"), pytest.raises(FormatError, match="in use"), work_folder(tmp_path / "out"):
        pass


def test_an_output_behind_a_link_has_one_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert work_path(tmp_path / "link") == work_path(tmp_path / "real")


# What is deleted, and what is not

DIE = """
import os, sys
from pathlib import Path
from secateur.files import whole_directory
with whole_directory(sys.argv[1]) as made:
    (made / "file").write_text("half")
    os.kill(os.getpid(), 9)
"""


def test_only_what_dead_processes_left_half_made_is_deleted(tmp_path):
    step = step_of(tmp_path / "out", finish={})
    (step.path / "notes.txt").write_text("mine")
    (step.path / ".model.partial").mkdir()  # no name that we give
    for place in (step.path / "pruned", work_path(tmp_path / "out") / "02-new-0"):
        subprocess.run([sys.executable, "-c", DIE, str(place)], check=False)
    assert len([*work_path(tmp_path / "out").rglob(".*.*.partial")]) == 2
    with whole_directory(step.path / "living"):
        living = [path.name for path in step.path.glob(".living.*.partial")]
        step_of(tmp_path / "out", facts={"model": "c"})
        left = [path.name for path in work_path(tmp_path / "out").rglob(".*.partial")]
    assert sorted(left) == sorted([".model.partial", *living])
    assert (step.path / "notes.txt").is_file()


def test_a_folder_without_steps_is_removed_again(tmp_path):
    with work_folder(tmp_path / "out"):
        assert work_path(tmp_path / "out").is_dir()
    assert not work_path(tmp_path / "out").exists()
    work_path(tmp_path / "out").mkdir()
    step_of(tmp_path / "out")  # an empty folder is as good as none
    assert work_path(tmp_path / "out").is_dir()


def test_work_in_progress_is_not_called_written(tmp_path):
    with note_written() as written, work_folder(tmp_path / "out") as work:
        step = work.step("shrink", FACTS)
        with whole_directory(step.path / "model"):
            pass
        step.finish()
        with whole_directory(tmp_path / "out"):
            pass
        assert written() == [tmp_path / "out"]


# What is refused


def link(path):
    path.symlink_to(path.parent / "elsewhere")
    (path.parent / "elsewhere").mkdir()


def stranger(path):
    path.mkdir()
    (path / "thesis.txt").write_text("mine")


def linked_lock(path):
    path.mkdir()
    (path / "work.json").write_text('{"format": 1, "generation": 1}')
    (path / "lock").symlink_to("/etc/passwd")


def with_manifest(text):
    def make(path):
        path.mkdir()
        (path / "work.json").write_text(text)

    return make


def linked_manifest(path):
    path.mkdir()
    (path.parent / "elsewhere.json").write_text('{"format": 1, "generation": 1}')
    (path / "work.json").symlink_to(path.parent / "elsewhere.json")


def linked_step(path):
    with_manifest('{"format": 1, "generation": 1}')(path)
    (path / "01-shrink-0").symlink_to(path.parent)


def step_with(text):
    def make(path):
        with_manifest('{"format": 1, "generation": 1}')(path)
        (path / "01-shrink-0").mkdir()
        (path / "01-shrink-0" / "step.json").write_text(text)

    return make


def piped_step(path):
    with_manifest('{"format": 1, "generation": 1}')(path)
    (path / "01-shrink-0").mkdir()
    os.mkfifo(path / "01-shrink-0" / "step.json")


GOOD = {"format": 1, "name": "shrink", "number": 1, "generation": 1, "order": 1, "facts": {}}
HOSTILE = {
    "a link": (link, "is a link"),
    "a file": (lambda path: path.write_text("mine"), "in the place of the folder"),
    "a folder of somebody": (stranger, r"no folder of work.*no work\.json"),
    "a lock that is a link": (linked_lock, "lock is a link"),
    "a manifest that is a link": (linked_manifest, "no regular file"),
    "a manifest that is no JSON": (with_manifest("{"), "not readable JSON"),
    "a manifest of the future": (with_manifest('{"format": 2, "generation": 1}'), "of format 2"),
    "a manifest without sense": (with_manifest('{"format": 1, "generation": true}'), "Remove the folder"),
    "a step that is a link": (linked_step, "01-shrink-0 is a link"),
    "a step that is no JSON": (step_with("[]"), "JSON object"),
    "a step without its name": (step_with('{"format": 1}'), "not what a run writes"),
    "a step with a wrong order": (step_with(json.dumps({**GOOD, "order": "1"})), "not what a run writes"),
    "a step with wrong facts": (step_with(json.dumps({**GOOD, "facts": [1]})), "not what a run writes"),
    "a step that waits for ever": (piped_step, "no regular file"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_is_no_folder_of_work_is_refused_and_kept(tmp_path, what):
    make, message = HOSTILE[what]
    make(work_path(tmp_path / "out"))
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    with pytest.raises(FormatError, match=message):
        step_of(tmp_path / "out")
    after = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}
    assert after >= set(before)
    assert not (tmp_path / "elsewhere" / "lock").exists()


def test_the_good_step_of_the_hostile_ones_is_read(tmp_path):
    step_with(json.dumps(GOOD))(work_path(tmp_path / "out"))
    assert step_of(tmp_path / "out").changed == ("model", "settings")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give folders away")
def test_a_folder_of_another_user_is_refused(tmp_path, monkeypatch):
    step_of(tmp_path / "out")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(FormatError, match="belongs to another user"):
        step_of(tmp_path / "out")


# Hashes


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "tokenizer.json").write_text("{}")
    save_file({"a": torch.ones(4, 4)}, path / "model.safetensors")
    return path


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "1_Pooling/config.json"])
def test_a_hash_of_a_model_is_that_of_all_its_files(model, name):
    before = hash_files(model)
    assert before == hash_files(str(model))
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_bytes(b"other")
    assert hash_files(model) != before


def test_names_count_and_the_place_does_not(model, tmp_path):
    before = hash_files(model)
    moved = model.rename(tmp_path / "moved")
    assert hash_files(moved) == before
    (moved / "tokenizer.json").rename(moved / "vocabulary.json")
    assert hash_files(moved) != before


def test_a_hash_of_a_text_is_that_of_its_contents(tmp_path):
    for name, text in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / name).write_text(text)
    assert hash_files(tmp_path / "a") == hash_files(tmp_path / "b") != hash_files(tmp_path / "c")


def test_what_cannot_be_hashed_is_said(tmp_path, model):
    with pytest.raises(FormatError, match="does not exist"):
        hash_files(tmp_path / "none")
    os.mkfifo(model / "pipe")
    with pytest.raises(FormatError, match="pipe is no regular file"):
        hash_files(model)
