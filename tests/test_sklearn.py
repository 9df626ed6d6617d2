"""The estimator of scikit-learn's interface."""

from __future__ import annotations

import pickle

import numpy as np
import pandas
import pytest
import torch
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from pyro_vae import class_probabilities, log_evidence
from pyro_vae.data import read_table
from pyro_vae.sklearn import VariationalAutoencoder

SMALL = {"hidden": (5,), "epochs": 2, "tolerance": 1.0, "budget": 6000}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:posterior collapse")
@parametrize_with_checks([VariationalAutoencoder(**SMALL)])
def test_scikit_learn_takes_it_for_an_estimator(estimator: object, check: object) -> None:
    check(estimator)


def frame(rows: int = 41) -> pandas.DataFrame:
    """A small table of numbers, text and missing cells."""
    noise = np.random.default_rng(0)
    size = noise.normal(size=rows)
    job = np.where(size > 0, "clerk", "baker").astype(object)
    job[:3] = "pilot"
    job[5] = None
    pay = np.exp(7 + size)
    pay[7] = np.nan
    x = pandas.DataFrame({"size": size, "job": job, "pay": pay})
    x["grade"] = pandas.Categorical(np.resize(["low", "high", None], rows), ["low", "high"], True)
    x["visits"] = pandas.array([2, None, 5, 40, *[1] * (rows - 4)], "Int64")
    x["rank"] = np.arange(rows) % 7
    x.index = [f"row {i // 2}" for i in range(rows)]  # twice each
    return x


@pytest.mark.filterwarnings("ignore:posterior collapse")
def test_frames_come_in_and_go_out_with_their_categories() -> None:
    x = frame()
    model = VariationalAutoencoder(2, **SMALL, random_state=3).fit(x)
    assert list(model.feature_names_in_) == list(x)
    rows, schema = read_table(x)
    assert schema == model.schema_
    truth = log_evidence(
        model.vae_, rows[:7].double(), tolerance=1.0, budget=6000, audit=False, seed=model._seed
    )
    np.testing.assert_allclose(model.score_samples(x[:7]), truth.log_prob)
    full = model.impute(x, num_draws=20)
    assert full.notna().all().all()
    assert full["job"].iloc[5] in ("baker", "clerk", "pilot")
    for name in x:
        seen = x[name].notna()
        assert full[name][seen].tolist() == x[name][seen].tolist()
    same = ["size", "pay", "grade", "rank"]
    assert full.dtypes[same].equals(x.dtypes[same])
    again = model.set_output(transform="pandas").inverse_transform(model.transform(x))
    assert full.index.equals(x.index)
    assert again.index.equals(x.index)
    for made in (again, model.sample(3)):
        assert list(made) == list(x)
        assert made.dtypes["grade"] == x.dtypes["grade"]
    with pytest.raises(ValueError, match="expected one of the categories baker, clerk, pilot"):
        model.transform(x.assign(job="diver"))


@pytest.mark.filterwarnings("ignore:posterior collapse")
def test_truth_values_come_back_as_such() -> None:
    random = np.random.default_rng(0)
    truth = random.random(60) < 0.5
    x = pandas.DataFrame({"size": random.normal(size=60), "sure": truth, "seen": truth})
    x["seen"] = x["seen"].astype(object).where(random.random(60) < 0.8, None)
    x["level"] = pandas.Categorical(truth + 1.5)
    model = VariationalAutoencoder(1, **SMALL, random_state=0).fit(x)
    drawn, full = model.sample(50), model.impute(x, num_draws=5)
    for name, dtype in x.dtypes.items():
        known = set(x[name].dropna())
        assert drawn.dtypes[name] == full.dtypes[name] == dtype
        if name != "size":
            assert len(known) == 2
            assert set(drawn[name]) == known
            assert set(full[name]) == known
            assert set(map(type, drawn[name])) == set(map(type, x[name].dropna()))
    numbered = x.set_axis(range(4), axis=1)
    model = VariationalAutoencoder(1, **SMALL, random_state=0).fit(numbered)
    assert set(model.sample(50)["1"]) == {False, True}
    assert model.impute(numbered, num_draws=5).notna().all().all()


@pytest.mark.filterwarnings("ignore:posterior collapse")
def test_imputed_numbers_are_rounded_as_their_column_is() -> None:
    random = np.random.default_rng(0)
    x = pandas.DataFrame({"tenths": random.normal(size=60).round(1)})
    x["years"] = pandas.array(random.poisson(30, 60), "Int64")
    x["small"] = random.normal(size=60).astype("float32").round(1)
    x["free"] = random.normal(size=60)
    x["whole"] = random.poisson(30, 60).astype(float)
    gaps = random.random((60, 5)) < 0.2
    assert gaps.sum(0).min() > 3
    full = VariationalAutoencoder(1, **SMALL, random_state=0).fit(x).impute(x.mask(gaps))
    assert full.dtypes.equals(x.dtypes)
    for name, digits in {"tenths": 1, "years": 0, "small": 1, "whole": 0}.items():
        values = full[name].to_numpy()
        np.testing.assert_allclose(values, values.round(digits), rtol=1e-6)
    assert (full["free"] != full["free"].round(2)).all()
    for empty, name in zip(gaps.T, x):
        assert (full[name][~empty] == x[name][~empty]).all()
    model = VariationalAutoencoder(1, **SMALL, random_state=0, schema={"years": "StudentT"})
    means = [model.fit(x).impute(z) for z in (x.mask(gaps), x.mask(gaps).astype({"years": float}))]
    np.testing.assert_array_equal(means[0]["years"].to_numpy(float), means[1]["years"])
    tenths = np.where(gaps, np.nan, x)[:, :1]
    values = VariationalAutoencoder(1, **SMALL, random_state=0).fit(tenths).impute(tenths)
    np.testing.assert_allclose(values, values.round(1), atol=1e-12, rtol=0)


@pytest.mark.filterwarnings("ignore:posterior collapse")
@pytest.mark.filterwarnings("ignore:X (does not have|has) .*feature names")
def test_an_array_holds_what_the_frame_held_that_the_model_was_trained_on() -> None:
    random = np.random.default_rng(0)
    x = pandas.DataFrame({"size": random.normal(size=60), "level": random.integers(1, 6, 60)})
    model = VariationalAutoencoder(1, **SMALL, random_state=0).fit(x)
    assert model.schema_.columns["level"].categories == (1, 2, 3, 4, 5)
    np.testing.assert_array_equal(
        model.score_samples(x[:9].to_numpy()), model.score_samples(x[:9])
    )
    gap = x[:9].to_numpy()
    gap[0, 1] = np.nan
    full = model.impute(gap)
    assert full["level"][0] in (1, 2, 3, 4, 5)
    assert (full["level"][1:] == x["level"][1:9]).all()
    plain = VariationalAutoencoder(1, **SMALL, random_state=0).fit(x.to_numpy())
    np.testing.assert_array_equal(plain.impute(x[:9]), plain.impute(x[:9].to_numpy()))


@pytest.mark.filterwarnings("ignore:posterior collapse")
def test_a_later_frame_may_have_fewer_categories_or_another_order_of_numbered_columns() -> None:
    random = np.random.default_rng(0)
    x = pandas.DataFrame({0: random.normal(size=60), 1: random.normal(size=60)})
    x[2] = pandas.Categorical(random.choice(list("xyz"), 60))
    model = VariationalAutoencoder(1, **SMALL, random_state=0).fit(x)
    later = x[x[2] != "z"][:9]
    few = later[2].astype(object).where(np.arange(9) > 0).astype("category")
    later = later[[1]].mask(np.arange(9)[:, None] == 1).join([few, later[0]])
    full = model.impute(later)
    assert full.notna().all().all()
    assert full[2].dtype == x[2].dtype
    assert full[2][1:].tolist() == later[2][1:].tolist()
    assert (full[0] == later[0]).all()


@pytest.mark.filterwarnings("ignore:posterior collapse")
def test_a_pipeline_a_search_and_named_outputs() -> None:
    x = np.random.default_rng(0).normal(size=(30, 3))
    x[4, 1] = np.nan
    model = VariationalAutoencoder(2, **SMALL, random_state=3)
    piped = make_pipeline(StandardScaler(), model).set_output(transform="pandas")
    names = ["variationalautoencoder0", "variationalautoencoder1"]
    assert list(piped.fit_transform(x).columns) == names
    search = GridSearchCV(model, {"n_components": [1, 2]}, cv=2).fit(x)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    fitted = search.best_estimator_
    assert np.array_equal(pickle.loads(pickle.dumps(fitted)).transform(x), fitted.transform(x))
    odd = fitted.fit(x).score_samples(x) < fitted.offset_
    assert odd.sum() == 3
    assert np.array_equal(fitted.predict(x) == -1, odd)


@pytest.mark.filterwarnings("ignore:posterior collapse")
def test_units_change_scores_by_their_logarithm() -> None:
    x = np.random.default_rng(0).normal(size=(30, 2))
    first, second = (
        VariationalAutoencoder(2, **{**SMALL, "hidden": 5}, random_state=3).fit(scale * x)
        for scale in (1.0, 1000.0)
    )
    shift = first.score_samples(x) - second.score_samples(1000 * x)
    np.testing.assert_allclose(shift, 2 * np.log(1000), atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:posterior collapse")
def test_few_labels_name_the_classes_of_rows() -> None:
    y = np.arange(17) % 3
    x = 5 * np.eye(3, 4)[y] + np.random.default_rng(0).normal(size=(17, 4))
    few = {**SMALL, "epochs": 200, "lr": 0.02, "prior": "NormalPerClass", "random_state": 3}
    model = VariationalAutoencoder(2, classes=3, label_weight=5.0, classifier=True, **few)
    share = model.fit(x, np.where(np.arange(17) < 6, y, np.nan)).predict_proba(x[:5])
    way = {"tolerance": 1.0, "budget": 6000, "audit": False, "seed": model._seed}
    truth = class_probabilities(model.vae_, torch.from_numpy(x[:5]), **way)
    np.testing.assert_array_equal(share, truth.probabilities)
    assert (model.classify(x[12:]) == y[12:]).all()
    assert model.inverse_transform(model.transform(x), y).shape == (17, 4)
    with pytest.raises(ValueError, match="inverse_transform needs y, the class of each code"):
        model.inverse_transform(model.transform(x))
    with pytest.raises(ValueError, match="labels must be from 0 to 2, for 3 classes"):
        model.fit(x, y + 1)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        model.fit(x, y[:5])
    with pytest.raises(
        ValueError, match="y must hold classes as numbers .* got: .*'cat'.*; number"
    ):
        model.fit(x, ["cat"] * 17)
    assert not hasattr(VariationalAutoencoder(), "predict_proba")


def test_a_kind_for_all_columns_and_numbers_too_close_together() -> None:
    x = np.random.default_rng(0).poisson(3.0, (31, 2))
    model = VariationalAutoencoder(1, schema="count", **SMALL, random_state=0).fit(x)
    assert [column.kind for column in model.schema_.columns.values()] == ["count"] * 2
    with pytest.raises(ValueError, match="column 'x1' holds .* subtract 1700000000"):
        model.set_params(schema=None).fit(np.c_[x[:, 0], 1.7e9 + np.arange(31)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contamination": 0.7}, "contamination must be at most 0.5"),
        ({"contamination": 0}, "contamination must be positive"),
        (
            {"schema": {"x7": "real"}},
            "array: the schema names columns that are not there: x7; there are x0, x1",
        ),
        ({"prior": "None"}, "prior 'None' is unknown"),
        ({"n_components": 0}, "latent_dim must be at least 1"),
    ],
)
def test_wrong_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VariationalAutoencoder(**options).fit(np.random.default_rng(0).normal(size=(11, 2)))
