"""A pipeline that is killed at any moment goes on to the same bytes; one that is stopped says how to go on."""

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pipeline_cases import make_encoder, make_texts, recipe
from safetensors.torch import load_file

pytest.importorskip("transformers")

STAGES = ("shrink", "prune", "recover", 'gates = ["sparsity >= 50%", "minutes <= 600"]', "pack")

# Runs the recipe again and again in children of one process that has imported everything, and computes nothing itself.
# A moment is the n-th one at which a file or folder is made, opened, renamed or removed, or progress is told.
SCRIPT = """
import hashlib, json, os, shutil, signal, sys
from pathlib import Path
import torch, transformers
import secateur, secateur.cli
from transformers import BertModel, AutoTokenizer

folder, output, moments, signal_name = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), sys.argv[4]
moment, at = 0, None

def tick(*_):
    global moment
    moment += 1
    if moment == at:
        if signal_name == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        signal.raise_signal(getattr(signal, signal_name))

def watch(event, arguments):
    if event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir") or (event == "open" and output in str(arguments[0])):
        if any(output in str(argument) for argument in arguments):
            tick()

def child(last):
    global at
    at = last
    torch.set_num_threads(1)
    sys.addaudithook(watch)
    if signal_name == "SIGKILL":
        secateur.Pipeline.load(folder / "r.toml").run(folder / "model", output, device="cpu", progress=tick)
        print(moment, flush=True)
        os._exit(0)
    from secateur.cli import _run
    from contextlib import contextmanager
    @contextmanager
    def told():
        yield tick
    _run.show_progress = told
    code = secateur.cli.app(["run", str(folder / "model"), "--recipe", str(folder / "r.toml"), "--output", output,
                             "--device", "cpu", "--threads", "1"], standalone_mode=False)
    sys.stdout.flush(); sys.stderr.flush()
    os._exit(code or 0)

def main():
    for last in moments:
        process = os.fork()
        if process == 0:
            child(last)
        _, status = os.waitpid(process, 0)
        print("status", os.waitstatus_to_exitcode(status), flush=True)
        if os.path.exists(output) and last is not moments[-1]:  # done before the next kill: begin anew
            print("bytes", hashlib.sha256(Path(output, "model.safetensors").read_bytes()).hexdigest(), flush=True)
            shutil.rmtree(output)
            shutil.rmtree(output + ".work")

main()
"""


def run(folder, output, moments, how="SIGKILL"):
    """Run the recipe once for each moment, at which it is killed; None is never. Return what was printed."""
    command = [sys.executable, "-c", SCRIPT, str(folder), str(output), json.dumps(moments), how]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def bytes_of(path):
    return {file.name: file.read_bytes() for file in sorted(Path(path).glob("*.safetensors"))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline")
    make_encoder(path / "model")
    make_texts(path)
    return path


@pytest.fixture(scope="module")
def whole(folder):
    """What a run gives that nobody disturbs, and at how many moments it could have been killed."""
    text = recipe(*STAGES[:-1]).replace("steps = 4", "steps = 30")
    assert "steps = 30" in text
    (folder / "r.toml").write_text(text, encoding="utf-8")
    done = run(folder, folder / "whole", [None])
    return bytes_of(folder / "whole"), int(done.stdout.split()[0])


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_moment_goes_on_to_the_same_bytes(folder, whole):
    expected, count = whole
    assert count > 40
    # Each run goes on where the one before was killed, at a moment of its own. Where one ends before its moment, the
    # next one begins anew.
    moments = [1 + (number * 7919) % (count // 3) for number in range(20)]
    done = run(folder, folder / "killed", [*moments, None])
    lines = [line.split() for line in done.stdout.splitlines()]
    statuses = [line[1] for line in lines if line[0] == "status"]
    assert statuses.count("-9") >= 18
    assert statuses[-1] == "0"
    assert {line[1] for line in lines if line[0] == "bytes"} <= {
        hashlib.sha256(expected["model.safetensors"]).hexdigest()
    }
    assert bytes_of(folder / "killed") == expected
    assert not [path.name for path in folder.rglob(".*.partial")]


@pytest.mark.parametrize(("how", "status", "word"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")])
def test_a_run_that_is_stopped_says_how_to_go_on(folder, whole, how, status, word):
    expected, count = whole
    output = folder / f"stopped{status}"
    done = run(folder, output, [count // 2, None], how)
    assert [line for line in done.stdout.splitlines() if line.startswith("status")] == [f"status {status}", "status 0"]
    assert f"secateur: {word}; nothing was written.\n" in done.stderr
    assert f"What was done so far is in {output}.work. The same command goes on from there.\n" in done.stderr
    assert bytes_of(output) == expected


def test_the_signals_are_numbered_as_shells_do():
    assert (128 + signal.SIGINT, 128 + signal.SIGTERM) == (130, 143)


def test_the_result_is_a_model_with_the_zeros_of_its_report(whole, folder):
    tensors = load_file(folder / "whole" / "model.safetensors")
    query = tensors["encoder.layer.0.attention.self.query.weight"]
    assert int((query == 0).sum()) == query.numel() // 2
