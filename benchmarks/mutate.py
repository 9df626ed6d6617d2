"""Damages the files of run folders at random, and looks at what the commands make of them.

A damaged file must be refused in one line that names it, or change nothing: weights, state of a
training, evidence and codes are compared with those of the whole run. Weights and states that
are forged, well-formed and with a new digest, may give other results, and no traceback. Nothing
outside the run may change. With 0 mutations each value of each record becomes another in turn.

    python benchmarks/mutate.py [mutations] [seed] [file ...]
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import math
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import yaml
from full_disk import FEW, QUIET, SMALL, said
from safetensors.torch import load, save

from pyro_vae.estimators import Evidence
from pyro_vae.training.run_folder import load_state, load_weights

TRAININGS = [
    ["--schedule=ReduceLROnPlateau", "--encoder.norm=batch"],
    [
        "--objective=FactorVAE",
        "--objective.width=11",
        "--schedule={class_path: StepLR, init_args: {step_size: 1}}",
    ],
]
ODD = [None, True, -1, 0, 1.5, 10**6, "", "x", "8", [], [1], {}, {"x": 1}, {"class_path": [1]}]
READERS = {
    "run.json": ("sample", "encode", "resume"),
    "config.yaml": ("sample", "resume"),
    "data.json": ("encode", "sample", "report"),
    "metrics.csv": ("plot", "report"),
    "parts.csv": ("plot", "resume"),
    "evaluation.json": ("report",),
    "evidence.safetensors": ("report",),
    "current.json": ("sample", "resume"),
    "weights.safetensors": ("sample", "resume"),
    "state.pt": ("resume",),
    "own.npz": ("encode",),
    "own.csv": ("encode",),
}


def make(folder: Path) -> Path:
    """A run with all files, and two files of rows beside it."""
    run, rng = folder / "run", np.random.default_rng(0)
    np.save(folder / "x.npy", rng.normal(10, 3, (97, 4)).astype(np.float32))
    given = ["--data", str(folder / "x.npy"), "--likelihood=Normal", "--epochs=2", QUIET]
    given += random.choice(TRAININGS)
    assert said("train", *SMALL, *given, f"--run={run}")[0] == 0
    assert said("evaluate", str(run), *FEW)[0] == 0
    x = rng.normal(10, 3, (5, 4)).astype(np.float32)
    np.savez(run / "own.npz", x=x)
    np.savetxt(run / "own.csv", x, delimiter=",", header="a,b,c,d", comments="")
    return run


def argv(name: str, run: Path, file: str) -> list[str]:
    """A command on a run."""
    if name == "resume":
        return ["train", "--resume", str(run), "--epochs=3", QUIET]
    rows = file if file.startswith("own") else "own.npz"
    more = {"encode": [str(run / rows), f"--out={run / 'codes.csv'}"], "sample": ["--size=2"]}
    return [name, str(run), *more.get(name, [])]


def flipped(data: bytes) -> bytes:
    place = random.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << random.randrange(8)]) + data[place + 1 :]


def zeroed(data: bytes) -> bytes:
    place = random.randrange(len(data))
    return (data[:place] + bytes(32) + data[place + 32 :])[: len(data)]


def cut(data: bytes) -> bytes:
    return data[: random.randrange(len(data))]


def doubled(data: bytes) -> bytes:
    place = random.randrange(len(data))
    return data[:place] + data[max(0, place - 40) :]


def noisy(data: bytes) -> bytes:
    place = random.randrange(len(data))
    return data[:place] + random.randbytes(9) + data[place:]


def other(_: bytes) -> bytes:
    return random.choice([b"", b"{}", b"[1, 2]", b"null", b"\xff\x00noise", b"a: [", b"x\n1\n"])


def rewritten(data: bytes) -> bytes:
    """Well-formed JSON or YAML, one of its values or keys another; a cell of a table."""
    text = data.decode()
    if not text.startswith("{") and ": " not in text:
        cells = text.split(",")
        cells[random.randrange(len(cells))] = random.choice(["x", "", "nan", "-1", "1e999", "1\n"])
        return ",".join(cells).encode()
    content = yaml.safe_load(text)
    places = list(walk(content))
    inside, key = random.choice(places)
    if random.random() < 0.3 and isinstance(inside, dict):
        inside.pop(key)
        if random.random() < 0.5:
            inside["unknown"] = 1
    else:
        inside[key] = random.choice(ODD)
    text = json.dumps(content) if text.startswith("{") else yaml.safe_dump(content)
    return text.encode()


def each_value(run: Path) -> Iterator[tuple[str, Callable[[bytes], bytes]]]:
    """One damage for each place in the records of a run: its value is an odd one."""
    for file in ("run.json", "config.yaml", "data.json", "evaluation.json", "current.json"):
        (path,) = run.rglob(file)
        content = yaml.safe_load(path.read_text())
        for place in range(len(list(walk(content)))):
            yield file, partial(with_odd_value, place)


def with_odd_value(place: int, data: bytes) -> bytes:
    """A record of which the value at one place is another."""
    content = yaml.safe_load(data)
    inside, key = list(walk(content))[place]
    inside[key] = random.choice(ODD)
    return json.dumps(content).encode()  # YAML too


def forged_state(data: bytes) -> bytes:
    """A state that torch can load, with something else at one place inside, of any depth."""
    state: Any = torch.load(io.BytesIO(data), weights_only=True)
    inside, key = random.choice([*walk(state), *[(state, key) for key in state]])
    if random.random() < 0.2 and isinstance(inside, dict):
        inside.pop(key)
    else:
        inside[key] = random.choice(OTHER)(inside[key])
    file = io.BytesIO()
    torch.save(random.choice([state] * 29 + [{}, [], 3]), file)
    return file.getvalue()


def forged_weights(data: bytes) -> bytes:
    """Weights of which one is another."""
    weights = load(data)
    name = random.choice(list(weights))
    value = random.choice(OTHER)(weights.pop(name))
    if isinstance(value, torch.Tensor) and not value.is_sparse and value.numel() < 10**6:
        weights[random.choice([name] * 9 + ["other"])] = value.contiguous()
    return save(weights)


def odd(_: Any) -> Any:
    return copy.deepcopy(random.choice(ODD))


def odd_tensor(value: Any) -> Any:
    """A tensor of another shape, type or content; of a number, a tensor."""
    value = torch.as_tensor(value) if isinstance(value, bool | int | float) else value
    if not isinstance(value, torch.Tensor):
        return random.choice([math.nan, math.inf, -(10**30), 10**30, 1j, b"x", "x" * 10**4])
    ways = [
        value.double(), value.half(), value.long(), value.bool(), value.to(torch.complex64),
        value.flatten()[:-1], value.unsqueeze(0), value.new_zeros(0), value[..., None] * 0 + 1,
        torch.full_like(value, 127), value.float() * math.nan, value.float() * 1e38,
        torch.zeros(()).expand(2**31), value.to_sparse(),
    ]  # fmt: skip
    return random.choice(ways)


OTHER = (odd, odd_tensor, odd_tensor)


def walk(content: Any) -> Any:
    """All places in nested mappings and lists."""
    if isinstance(content, dict | list):
        for key in content if isinstance(content, dict) else range(len(content)):
            yield content, key
            yield from walk(content[key])


RANDOM = (flipped, zeroed, cut, doubled, noisy, other)


def chosen(file: str) -> Callable[[bytes], bytes]:
    """How to damage a file."""
    if file == "state.pt":
        return random.choice([*RANDOM, *[forged_state] * 6])
    if file == "weights.safetensors":
        return random.choice([*RANDOM, *[forged_weights] * 6])
    if file.endswith((".safetensors", ".npz")):
        return random.choice(RANDOM)
    return random.choice([*RANDOM, *[rewritten] * 6])


def digest(value: Any) -> str:
    """Of nested tensors and numbers."""
    file = io.BytesIO()
    torch.save(value, file)
    return hashlib.sha256(file.getvalue()).hexdigest()


def kept(run: Path, file: str) -> list[Any]:
    """What must be as in the whole run, if it can be read at all."""
    if file == "weights.safetensors":
        return [digest(load_weights(run, which)) for which in ("best", "last")]
    if file == "state.pt":
        return [digest(load_state(run))]
    if file == "evidence.safetensors":
        return [digest(vars(Evidence.load(run / file)))]
    return []


def attempt(run: Path, name: str, file: str) -> tuple[str, str]:
    """How a command ends on a run, and what it says."""
    status, lines = said(*argv(name, run, file))
    if status == 0:
        return "accepted", ""
    if isinstance(status, str):
        return "traceback", status
    return ("refused" if status == 2 and len(lines) == 1 else "unclear"), "\n".join(lines)


def judged(whole: Path, run: Path, file: str, forged: bool) -> tuple[str, str]:
    """What becomes of one damaged file: the worst of what the commands do.

    One that is forged, well-formed and with a new digest, may be other; it may not crash.
    """
    try:
        silent = not forged and kept(run, file) != kept(whole, file)
    except Exception:
        silent = False
    found = [("silently other", "")] if silent else []
    found += [attempt(run, name, file) for name in READERS[file]]
    order = ["traceback", "silently other", "unclear", "refused", "accepted"]
    return min(found, key=lambda pair: order.index(pair[0]))


def main(mutations: int = 296, seed: int = 0, *files: str) -> int:
    """The number of mutations that ended in a traceback, a silent change or unclear words."""
    random.seed(seed)
    counts: Counter[tuple[str, str]] = Counter()
    with TemporaryDirectory() as name:
        whole, run = make(Path(name)), Path(name) / "copy"
        around = outside(Path(name))
        some = (random.choice(files or list(READERS)) for _ in range(mutations))
        for file, damage in ((f, chosen(f)) for f in some) if mutations else each_value(whole):
            shutil.copytree(whole, run)
            (path,) = random.sample(sorted(run.rglob(file)), 1)
            path.write_bytes(damage(path.read_bytes()))
            forged = damage in (forged_state, forged_weights)
            if forged:
                renew_digest(run, path)
            how, words = judged(whole, run, file, forged)
            how = how if outside(Path(name)) == around else "written outside"
            counts[file, how] += 1
            if how not in ("refused", "accepted"):
                print(f"{file}, {damage}: {how}\n{words}", flush=True)
            shutil.rmtree(run)
    total = Counter(how for _, how in counts.elements())
    for (file, how), count in sorted(counts.items()):
        print(f"{file:24}{how:16}{count}")
    mutations = total.total()
    print(f"{mutations} mutations: " + ", ".join(f"{n} {how}" for how, n in total.items()))
    return mutations - total["refused"] - total["accepted"]


def outside(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of all files here that are not those of the damaged run."""
    files = (path for path in folder.rglob("*") if folder / "copy" not in path.parents)
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in files if p.is_file()}


def renew_digest(run: Path, path: Path) -> None:
    """Makes a forged file of a checkpoint one that its pointers hold for right."""
    pointers = run / "checkpoints/current.json"
    content = json.loads(pointers.read_text())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    content["sha256"][path.parent.name][path.name] = digest
    pointers.write_text(json.dumps(content))


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:3]), *sys.argv[3:]) > 0)
