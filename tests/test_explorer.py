"""The page that runs a decoder: what it holds is right, and a browser computes what torch does."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import struct
import zlib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from browser import CHROMIUM, Browser
from families import LIKELIHOODS, NETWORKS, accepted, name
from torch import Tensor, nn

from pyro_vae import build, load
from pyro_vae.__main__ import main
from pyro_vae.cli.explore import LowerLayers, Mean, evaluated, explore
from pyro_vae.data import Data, load_data
from pyro_vae.data.schema import Schema
from pyro_vae.data.transforms import Identity, Standardise
from pyro_vae.estimators import Evidence
from pyro_vae.explorer import CannotRun, Content, Program, Rows, page, trace
from pyro_vae.likelihoods import Columns
from pyro_vae.networks import Conv, ConvTranspose, Network, ResNet, ResNetTranspose

N, D, SHAPE = 13, 2, (3, 5, 7)


def randomised(module: nn.Module) -> nn.Module:
    """Weights and running statistics as after training: none is where it started."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(part.running_mean)
            nn.init.uniform_(part.running_var, 0.5, 2)
    return module.eval()


def content(decoder: nn.Module, shape: tuple[int, ...] = SHAPE, **options: Any) -> Content:
    torch.manual_seed(3)
    codes = dist.Normal(torch.randn(N, D), 0.1 + torch.rand(N, D)).to_event(1)
    log_prob = torch.full((N,), math.nan)
    log_prob[5] = -31.0
    rows = Rows(
        numbers=7 * torch.arange(N),
        codes=codes,
        elbo=-40 - torch.arange(N) / 11,
        log_prob=log_prob,
        stderr=log_prob.abs() / 1000,
        verdict=["reliable" if i == 5 else "" for i in range(N)],
        shown=torch.rand(N, *shape),
        labels=torch.arange(N) % 3,
    )
    limits = torch.tensor(0.0), torch.tensor(1.0)
    given: dict[str, Any] = {
        "name": "<b>{{SCRIPT}}</b>",
        "about": ["One <i>sentence</i>."],
        "prior": dist.Normal(torch.zeros(D), torch.ones(D)).to_event(1),
        "rows": rows,
        "limits": limits,
        "kl": torch.tensor([0.5, 1.5]),
        "order": "KL, in nats",
    }
    return Content(decoder=decoder, **{**given, **options})


def vae(
    likelihood: str | dict[str, Any] = "Bernoulli",
    decoder: str | dict[str, Any] = "MLP",
    shape: Any = None,
    **options: Any,
) -> Any:
    torch.manual_seed(2)
    given = {"latent_dim": D, "likelihood": likelihood, "decoder": decoder, **options}
    return randomised(build(shape or SHAPE, **given))


class Held:
    """What a page holds, read back."""

    def __init__(self, text: str) -> None:
        (data,) = re.findall(r'<script type="text/plain" id="data">([^<]*)</script>', text)
        self.bytes = zlib.decompress(base64.b64decode(data))
        (length,) = struct.unpack("<I", self.bytes[:4])
        self.header = json.loads(self.bytes[4 : 4 + length])
        self.start = 4 + length

    def tensor(self, entry: dict[str, Any]) -> Tensor:
        kind = {"f2": torch.float16, "f4": torch.float32, "u1": torch.uint8}[entry["kind"]]
        flat = torch.frombuffer(
            bytearray(self.bytes),
            dtype=kind,
            offset=self.start + entry["at"],
            count=math.prod(entry["shape"]),
        )
        return flat.reshape(entry["shape"])


@pytest.mark.parametrize("decoder", ["GatedMLP", "ConvTranspose"])
def test_steps_are_the_decoder(decoder: str) -> None:
    model = Mean(vae("Normal", decoder), Identity())
    z = torch.randn(1, D)
    program = trace(model, torch.zeros(1, D))
    with torch.no_grad():
        exact = model(z)
    assert (program.single()(z) - exact).abs().max() < 1e-5 * exact.abs().max()
    assert 0 < (program(z) - exact).abs().max() < 0.01 * exact.abs().max()


def test_means_are_in_the_units_of_the_data() -> None:
    model = vae("Normal")
    rows = 5 + 3 * torch.randn(17, *SHAPE)
    program = trace(Mean(model, Standardise.fit(rows)), torch.zeros(1, D))
    z = torch.randn(1, D)
    with torch.no_grad():
        exact = model.likelihood(z).mean * rows.std(0, correction=0) + rows.mean(0)
    torch.testing.assert_close(program.single()(z), exact)


def test_page_is_complete_in_itself_and_escapes_names() -> None:
    text = page(content(Mean(vae(), Identity())))
    assert "http:" not in text
    assert "https:" not in text
    assert not re.findall(r"\s(?:src|href|on\w+|style)=", text)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    for part, kind in ((style, "style-src"), (script, "script-src")):
        digest = base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy
    assert text.count("&lt;b&gt;{{SCRIPT}}&lt;/b&gt;") == 2
    assert "<i>sentence" not in text


def test_page_holds_the_rows_and_the_weights() -> None:
    model = vae()
    given = content(Mean(model, Identity()))
    held = Held(page(given))
    rows, decoder = held.header["rows"], held.header["decoder"]
    torch.testing.assert_close(held.tensor(rows["means"]), given.rows.codes.mean)
    torch.testing.assert_close(held.tensor(rows["scales"]), given.rows.codes.stddev)
    assert held.tensor(rows["numbers"]).tolist() == given.rows.numbers.tolist()
    assert held.tensor(rows["log_prob"]).isnan().sum() == N - 1
    assert rows["verdict"][5] == "reliable"
    shown = given.rows.shown
    assert shown is not None
    assert (held.tensor(rows["shown"]) / 255 - shown).abs().max() < 0.51 / 255
    weights = [held.tensor(entry) for entry in decoder["constants"]]
    total = sum(p.numel() for p in model.likelihood.parameters())
    assert sum(w.numel() for w in weights) == total
    assert {w.dtype for w in weights if w.ndim > 1} == {torch.float16}
    assert "runs in this page" in decoder["said"]


def test_holes_are_where_the_prior_has_more_mass_than_codes() -> None:
    """Codes that are all N(m, s^2): log p(z) less log q(z) is known."""
    m, s = torch.tensor([0.3, -0.7]), torch.tensor([0.5, 0.8])
    given = content(Mean(vae(), Identity()))
    codes = dist.Normal(m.expand(N, D), s.expand(N, D)).to_event(1)
    rows = Rows(**{**vars(given.rows), "codes": codes})
    held = Held(page(content(given.decoder, rows=rows)))
    draws, grid = held.header["draws"], held.header["grid"]
    z = held.tensor(draws["z"])
    exact = (-(z**2) / 2 + ((z - m) / s) ** 2 / 2 + s.log()).sum(-1)
    torch.testing.assert_close(held.tensor(draws["excess"]), exact, rtol=1e-4, atol=1e-4)
    side, (left, bottom), (right, top) = grid["side"], grid["low"], grid["high"]
    across = left + (right - left) * (torch.arange(side) + 0.5) / side
    down = top - (top - bottom) * (torch.arange(side) + 0.5) / side
    for name_, loc, scale in (("log_p", torch.zeros(2), torch.ones(2)), ("log_q", m, s)):
        one = [dist.Normal(loc[d], scale[d]) for d in range(2)]
        exact = one[1].log_prob(down)[:, None] + one[0].log_prob(across)
        found = held.tensor(grid[name_]).reshape(side, side)
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)


def test_a_prior_of_components_is_drawn_from_by_the_page_and_a_flow_is_not() -> None:
    model = vae(prior={"class_path": "MixtureOfGaussians", "init_args": {"num_components": 5}})
    with torch.no_grad():
        mixture = model.prior()
    held = Held(page(content(Mean(model, Identity()), prior=mixture)))
    prior = held.header["prior"]
    torch.testing.assert_close(held.tensor(prior["weights"]), mixture.logits.softmax(-1))
    torch.testing.assert_close(held.tensor(prior["scale"]), mixture.scale)
    heavy = dist.StudentT(torch.full((D,), 3.0), torch.zeros(D), torch.ones(D)).to_event(1)
    assert Held(page(content(Mean(model, Identity()), prior=heavy))).header["prior"] == {}


class Sorted(nn.Module):
    """A decoder of one's own, with an operation that the page lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, math.prod(SHAPE))

    def forward(self, z: Tensor) -> Tensor:
        return self.linear(z).sort(-1).values.unflatten(-1, SHAPE).sigmoid()


def test_a_decoder_of_ones_own_becomes_an_atlas_and_the_page_says_so() -> None:
    decoder = Sorted()
    with pytest.raises(CannotRun, match="the page has no operation 'sort'"):
        trace(decoder, torch.zeros(1, D))
    held = Held(page(content(decoder)))
    atlas = held.header["decoder"]
    assert "does not run in the page (the page has no operation 'sort')" in atlas["said"]
    z, x = held.tensor(atlas["z"]), held.tensor(atlas["x"])
    with torch.no_grad():
        assert (x / 255 - decoder(z)).abs().max() < 0.51 / 255


def test_a_page_too_large_becomes_an_atlas_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = {"class_path": "MLP", "init_args": {"hidden": [2999]}}
    given = content(Mean(vae(decoder=wide), Identity()))
    module = import_module("pyro_vae.explorer")
    monkeypatch.setattr(module, "MAX_BYTES", 500_000)
    said = Held(page(given)).header["decoder"]["said"]
    assert re.search(r"does not run in the page \(its page would take 0.\d MB\)", said)
    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="show fewer rows, or leave the data out"):
        page(content(Sorted()))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "digits"
    options = ["--encoder.hidden=[11]", "--decoder.hidden=[11]", "--latent-dim=3", "--limit=211"]
    prior = ["--prior=VampPrior", "--prior.num_components=5"]
    fast = ["--epochs=2", "--progress=false", f"--run={folder}"]
    assert main(["train", *options, *prior, *fast]) == 0
    return folder


def explored(run: Path, *options: str) -> Held:
    assert main(["explore", str(run), "--limit=13", "--progress=false", *options]) == 0
    return Held((run / "explore.html").read_text())


@pytest.mark.slow  # an audit
def test_rows_of_a_run_and_their_evidence(run: Path, capsys: pytest.CaptureFixture) -> None:
    held = explored(run, "--judged=3")
    rows = held.header["rows"]
    assert held.tensor(rows["log_prob"]).isfinite().sum() == 3
    part = load_data("digits", transform="threshold", limit=211).test
    x, _ = part.batch(held.tensor(rows["numbers"]).long())
    with torch.no_grad():
        means = load(run).encode(x).mean
    torch.testing.assert_close(held.tensor(rows["means"]), means)
    assert (held.tensor(rows["shown"]) / 255 == x).all()
    assert list(held.tensor(held.header["prior"]["inputs"]).shape) == [5, 1, 8, 8]
    assert "explore.html: open it in a browser" in capsys.readouterr().out
    assert main(["report", str(run)]) == 0
    assert 'href="explore.html"' in (run / "report.html").read_text()


def test_layers_below_follow() -> None:
    model = vae(latent_dim=[5, D])
    z = torch.randn(1, 5 + D)
    with torch.no_grad():
        above = z[:, 5:]
        exact = model.prior().draw(lambda name, fn: above if name == "z2" else fn.mean)
    found = trace(LowerLayers(model, 5), torch.zeros_like(z)).single()(z)
    torch.testing.assert_close(found, exact)
    assert (found[:, :5] != z[:, :5]).all()


def test_what_evaluate_found_is_used_if_it_is_of_these_rows_and_weights(tmp_path: Path) -> None:
    values = torch.tensor([-3.0, -5.0])
    found = Evidence(
        values, *(values.abs() + i for i in range(4)), ["AIS"] * 2, ["reliable", "doubtful"]
    )
    numbers = {"elbo": -4.125, "rows_of": "all 2 rows of the test part"}
    assert evaluated(tmp_path, numbers["rows_of"], -4.125) is None  # type: ignore[arg-type]
    found.save(tmp_path / "evidence.safetensors")
    (tmp_path / "evaluation.json").write_text(json.dumps(numbers))
    kept = evaluated(tmp_path, "all 2 rows of the test part", -4.12501)
    assert kept is not None
    assert kept.log_prob.tolist() == values.tolist()
    assert evaluated(tmp_path, "all 2 rows of the test part", -4.13) is None
    assert evaluated(tmp_path, "all 3 rows of the test part", -4.125) is None


def test_no_data_leaves_the_rows_and_pseudo_inputs_out(run: Path) -> None:
    held = explored(run, "--judged=0", "--no-data")
    assert "shown" not in held.header["rows"]
    assert "inputs" not in held.header["prior"]
    assert "not the rows themselves" in " ".join(held.header["about"])


class Pair(nn.Module):
    """Programs of one's own, of a condition too; what `after` does to the means is given."""

    def __init__(self, after: Any = torch.sigmoid, **sites: Any) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(7 + 3, 2 * D), nn.Linear(D + 3, 7)
        self.after, self.sites = after, sites

    def model(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            for name, fn in self.sites.items():
                pyro.sample(name, fn)
            z = pyro.sample("z", dist.Normal(torch.ones(D), 2.0).to_event(1))
            mean = self.after(self.decoder(torch.cat([z, y], -1)))
            pyro.sample("x", dist.Normal(mean, 0.3).to_event(1), obs=x)

    def guide(self, x: Tensor, y: Tensor) -> None:
        loc, raw = self.encoder(torch.cat([x, y], -1)).chunk(2, -1)
        with pyro.plate("data", len(x), dim=-1):
            for name, fn in self.sites.items():
                pyro.sample(name, fn)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


def test_programs_of_ones_own_are_explored_from_python(tmp_path: Path) -> None:
    torch.manual_seed(3)
    own, x, y = Pair(), torch.randn(13, 7), torch.randn(13, 3)
    before, state = {k: v.clone() for k, v in own.state_dict().items()}, torch.get_rng_state()
    found = explore(own, (x, y), tmp_path / "own.html", limit=11, judged=2)
    held = Held(found.read_text())
    header, rows = held.header, held.header["rows"]
    index = held.tensor(rows["numbers"]).long()
    with torch.no_grad():
        loc, raw = own.encoder(torch.cat([x, y], -1)[index]).chunk(2, -1)
    torch.testing.assert_close(held.tensor(rows["means"]), loc)
    torch.testing.assert_close(held.tensor(rows["scales"]), raw.exp())
    torch.testing.assert_close(held.tensor(rows["shown"]), x[index])
    assert held.tensor(rows["log_prob"]).isfinite().sum() == 2
    assert "runs in this page" in header["decoder"]["said"]
    names = [step[0] for step in header["decoder"]["program"]["steps"]]
    assert "sigmoid" in names
    assert header["about"][0] == "The programs of Pair, of 2 latents."
    assert own.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[k], v) for k, v in own.state_dict().items())


def test_programs_that_the_page_lacks_become_an_atlas_of_their_means(tmp_path: Path) -> None:
    torch.manual_seed(4)
    own = Pair(lambda mean: mean.sort(-1).values)
    found = explore(own, (torch.randn(5, 7), torch.randn(5, 3)), tmp_path / "own.html", judged=0)
    atlas = (held := Held(found.read_text())).header["decoder"]
    z, y, x = (held.tensor(atlas[name]) for name in ("z", "y", "x"))
    with torch.no_grad():
        exact = own.decoder(torch.cat([z, y], -1)).sort(-1).values
    torch.testing.assert_close(x, exact)


def test_codes_of_a_table_have_their_names(tmp_path: Path) -> None:
    kinds = {"job": ["baker", "clerk", "pilot"], "member": ["no", "yes"]}
    plain = {n: {"kind": k, "categories": kinds[n]} for n, k in zip(kinds, ("category", "binary"))}
    schema = Schema.restore({**plain, "age": "real"})
    rows = torch.tensor([[0.0, 1, 31.5], [2, 0, 47.5], [1, 1, 23.0]])
    ids = torch.tensor([7, 3, 11])  # of the rows in their file
    data = Data(rows, columns=tuple(schema.columns), schema=schema, rows=ids)
    model = build(3, 2, likelihood=schema.likelihood)
    held = Held(explore(model, data, tmp_path / "table.html", judged=0).read_text())
    named = [["baker", "clerk", "pilot"], ["no", "yes"], []]
    assert held.header["output"]["categories"] == named
    assert torch.equal(held.tensor(held.header["rows"]["numbers"]).long(), ids)
    lines = explore(model, data.x.tolist(), tmp_path / "lists.html", judged=0)
    found = Held(lines.read_text())
    means = [each.tensor(each.header["rows"]["means"]) for each in (held, found)]
    assert torch.equal(*means)


@pytest.mark.slow
def test_the_page_names_codes_and_shares(shown: Browser) -> None:
    cells = (
        "[cell(1.2, ['no', 'yes', 'so']), cell(0, ['no', 'yes']), cell(3.25, []), cell(1987, [])]"
    )
    assert shown.run(cells) == ["yes", "no", "3.25", "1987"]
    assert shown.run("values([1.5, NaN])") == "x0 1.5, x1 missing"
    assert shown.run("[fixed(-0.001), fixed(-1.006)]") == ["0.00", "-1.01"]


def test_programs_of_other_sites_and_evidence_of_other_rows_are_refused(tmp_path: Path) -> None:
    data, more = (torch.randn(5, 7), torch.randn(5, 3)), {"w": dist.Normal(0.0, 1.0)}
    with pytest.raises(ValueError, match=r"one latent site, of event \(D,\); the model has {'w'"):
        explore(Pair(**more), data, tmp_path / "own.html", judged=0)
    values = torch.zeros(3)
    other = Evidence(values, *[values] * 4, ["AIS"] * 3, ["reliable"] * 3)
    with pytest.raises(ValueError, match="of the 5 rows shown; got 3"):
        explore(Pair(), data, tmp_path / "own.html", evidence=other)
    with pytest.raises(ValueError, match="the programs model and guide; got method"):
        explore(Pair().model, data, tmp_path / "own.html")
    with pytest.raises(ValueError, match="in a folder that exists"):
        explore(Pair(), data, tmp_path / "none" / "own.html")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: install chromium to run this test")
    with Browser(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.fixture(scope="module")
def shown(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Browser:
    """A browser that shows a page of a convolutional decoder."""
    decoder = Mean(vae("Bernoulli", "ConvTranspose"), Identity())
    path = tmp_path_factory.mktemp("page") / "explore.html"
    path.write_text(page(content(decoder)))
    browser.open(path)
    return browser


def in_page(browser: Browser, program: Program, x: Tensor) -> Tensor:
    """What the page's operations make of `x`."""
    constants = [[list(c.shape), c.float().flatten().tolist()] for c in program.constants]
    script = f"""(() => {{
        const put = ([shape, data]) => made(shape, Float32Array.from(data, Number));
        const run = runnable({json.dumps(program.declare())}, {json.dumps(constants)}.map(put));
        const out = run([put({json.dumps([list(x.shape), x.flatten().tolist()])})]);
        return [out.shape, [...out.data]]; }})()"""
    shape, data = browser.run(script.replace("NaN", '"NaN"'))
    return torch.tensor(data).reshape(shape)


def compare(browser: Browser, module: nn.Module, x: Tensor) -> None:
    """The page is torch with the weights that it holds, and near torch with its own."""
    program = trace(module, torch.zeros_like(x))
    found = in_page(browser, program, x)
    torch.testing.assert_close(found, program(x), rtol=2e-5, atol=2e-5)
    with torch.no_grad():
        exact = module(x)
    assert (found - exact).abs().max() < 0.02 * exact.abs().max().clamp(min=1)


@pytest.mark.slow
@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("cls", NETWORKS, ids=name)
def test_the_browser_computes_every_network(
    cls: type[Network], norm: str | None, shown: Browser
) -> None:
    torch.manual_seed(5)
    image = (3, 11, 13)
    sizes: dict[type, Any] = {Conv: (image, 7), ResNet: (image, 7)}
    sizes |= {ConvTranspose: (7, image), ResNetTranspose: (7, image)}
    shape, out = sizes.get(cls, (7, 5))
    options = accepted(cls, norm=norm, channels=(5, 3), hidden=(11,))
    net = randomised(cls(shape, out, **options))  # type: ignore[arg-type]
    compare(shown, net, torch.randn(1, *net.in_shape))


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "elu", "softplus", "gelu"])
def test_the_browser_computes_every_activation(activation: str, shown: Browser) -> None:
    options = {"activation": activation, "norm": "layer"}
    model = vae("Normal", {"class_path": "MLP", "init_args": options})
    compare(shown, Mean(model, Identity()), torch.randn(1, D))


@pytest.mark.slow
@pytest.mark.parametrize("cls", LIKELIHOODS, ids=name)
def test_the_browser_computes_the_mean_of_every_likelihood(cls: type, shown: Browser) -> None:
    options = accepted(cls, levels=5)
    declared = {"class_path": cls.__name__, "init_args": options}
    model = vae(declared, shape=(5,) if cls is Columns else SHAPE)
    compare(shown, Mean(model, Identity()), torch.randn(1, D))


@pytest.mark.slow
def test_the_browser_finds_the_commonest_category(shown: Browser) -> None:
    kind = {"class_path": "Categorical", "init_args": {"levels": 5}}
    declared = {"class_path": "Columns", "init_args": {"columns": ["Normal", kind, kind]}}
    model = Mean(vae(declared, shape=(3,)), Identity())
    codes = torch.cat([model(z) for z in torch.randn(31, 1, D)])[:, 1:]
    assert len(codes.unique()) > 2
    for z in torch.randn(5, 1, D):
        compare(shown, model, z)


@pytest.mark.slow
def test_the_page_decodes_what_it_holds(shown: Browser) -> None:
    model = Mean(vae("Bernoulli", "ConvTranspose"), Identity())
    program = trace(model, torch.zeros(1, D))
    for z in torch.randn(5, D):
        found = torch.tensor(shown.run(f"[...decoded(Float32Array.from({z.tolist()}))]"))
        torch.testing.assert_close(found, program(z[None]).flatten(), rtol=2e-5, atol=2e-5)
        with torch.no_grad():
            assert (found - model(z[None]).flatten()).abs().max() < 0.01


@pytest.mark.slow
def test_a_person_moves_picks_and_selects(shown: Browser) -> None:
    """By pointer and by keys, in a window; nothing is asked of the network."""
    screen = {"width": 1400, "height": 1800, "deviceScaleFactor": 1, "mobile": False}
    shown.call("Emulation.setDeviceMetricsOverride", **screen)
    settle = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
    shown.run(settle)
    box = shown.run(
        "(() => { const b = $('map').getBoundingClientRect(); return [b.x, b.y, b.width]; })()"
    )
    left, top, side = box

    def drag(path: list[tuple[float, float]]) -> None:
        points = [(left + x * side, top + y * side) for x, y in path]
        shown.mouse("mousePressed", *points[0])
        for point in points[1:]:
            shown.mouse("mouseMoved", *point)
        shown.mouse("mouseReleased", *points[-1], held=False)
        shown.run(settle)

    drag([(0.03, 0.03), (0.25, 0.75)])
    ends = shown.run("[view.low, view.high]")
    z = shown.run("[...state.z]")
    quarter = [low + 0.25 * (high - low) for low, high in zip(*ends)]
    assert z == pytest.approx(quarter, abs=0.02)
    x, y = shown.run("place(held.rows.means, 5)")
    drag([(x / side, y / side)])
    assert shown.run("state.row") == 5
    assert shown.run("[...state.z]") == pytest.approx(shown.run("[...row(held.rows.means, 5)]"))
    words = shown.run("$('numbers').textContent")
    assert "row35" in words
    assert "-31.00 ± 0.031 nats, reliable" in words
    shown.run("document.querySelector('[value=select]').click()")
    drag([(0.001, 0.001), (0.999, 0.001), (0.999, 0.999), (0.001, 0.999)])
    assert shown.run("$('list').value") == ", ".join(str(7 * i) for i in range(N))
    half = [(0.001, 0.001), (0.5, 0.001), (0.5, 0.999), (0.001, 0.999)]
    drag(half)
    means = shown.run("[...Array(13).keys()].map(n => held.rows.means.data[2 * n])")
    middle = (ends[0][0] + ends[1][0]) / 2
    here = [7 * i for i in range(N) if means[i] < middle]
    assert shown.run("$('list').value") == ", ".join(map(str, here))
    shown.run("$('clear').click(); $('map').focus()")
    for key in ("ArrowRight", "Enter", " "):
        shown.key(key)
    assert shown.run("$('list').value") == str(7 * shown.run("state.row"))
    for script in ("$('draw').click()", "$('hole').click()", "$('as-to').click()"):
        shown.run(script)
    shown.run("$('ground').value = 'decoded'; $('ground').dispatchEvent(new Event('change'))")
    shown.run("$('position').value = 1; $('position').dispatchEvent(new Event('input'))")
    assert shown.run("[...state.z]") == pytest.approx(
        shown.run("[...row(held.rows.means, state.to)]"), abs=1e-5
    )
    shown.run(settle)
    assert shown.run("document.querySelectorAll('b, i').length") == 0  # names are text
    assert shown.run("document.title") == "<b>{{SCRIPT}}</b>: explorer"
    assert shown.messages == []
    assert all(address.startswith(("file:", "blob:")) for address in shown.addresses)
    assert len(shown.addresses) == 1


@pytest.mark.slow
def test_an_arc_keeps_its_distance_from_the_origin(shown: Browser) -> None:
    shown.run("document.querySelector('[value=arc]').click()")
    found = torch.tensor(shown.run("[0, 0.25, 0.5, 1].map(t => [...between(t)])"))
    a, b = found[0], found[-1]
    for t, z in zip((0.0, 0.25, 0.5, 1.0), found):
        assert z.norm().item() == pytest.approx((1 - t) * a.norm().item() + t * b.norm().item())
    assert shown.run("[...row(held.rows.means, state.from)]") == pytest.approx(a.tolist())


@pytest.mark.slow
def test_one_latent_is_moved_across_and_rows_stand_one_above_another(
    browser: Browser, tmp_path: Path
) -> None:
    torch.manual_seed(6)
    model, x = build(SHAPE, 1), torch.rand(N, *SHAPE).round()
    browser.open(explore(model, x, tmp_path / "one.html", judged=0))
    places = browser.run("[...Array(13).keys()].map(n => place(held.rows.means, n)[1])")
    assert places == sorted(places)
    assert len(set(places)) == N
    z = browser.run("(moveTo([0.75 * view.side, 0.1 * view.side]), state.z[0])")
    low, high = browser.run("[view.low[0], view.high[0]]")
    assert z == pytest.approx(low + 0.75 * (high - low), abs=1e-3)
