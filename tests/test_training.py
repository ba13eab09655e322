"""The options of a training."""

import itertools
import math
from dataclasses import fields

import pytest

from ptq import plugins
from ptq.errors import PluginError, SpecError
from ptq.training import Training
from ptq.training_setup import check_feed, read_training, training_of_quantized

SOURCES = [n for n in plugins.names("calibrators") if hasattr(plugins.load("calibrators", n), "training")]


def test_rate_rises_then_falls_to_nothing():
    how = Training(epochs=2, steps=50, warmup=10)
    rates = [how.rate(k) for k in range(100)]
    assert rates[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])
    assert rates[10] == 1 and rates[55] == pytest.approx(0.5) and 0 < rates[99] < 1e-3
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert {Training(schedule="constant", warmup=0).rate(k) for k in range(5)} == {1.0}


def test_text_and_back():
    how = Training(epochs=3, lr=0.25, loss="l1", feed="pool", compile=True)
    assert Training(**plugins.read_options(Training, "training", plugins.describe_options(how))) == how


def test_what_was_given_counts_before_the_effort_and_that_before_the_paper():
    paper = plugins.load("calibrators", "nayer").training
    assert read_training("", paper, "full") == paper
    quick = read_training("steps=7", paper, "quick")
    assert (quick.steps, quick.epochs, quick.lr) == (7, Training.presets["quick"]["epochs"], paper.lr)
    assert read_training(how := Training(epochs=1), paper, "quick") is how


def test_a_quantized_student_learns_in_one_way_from_any_source():
    for name in SOURCES:
        source = plugins.load("calibrators", name)()
        how, its = training_of_quantized("", source, "full"), source.training
        assert (how.feed, how.rounds, how.first_rounds) == (its.feed, its.rounds, its.first_rounds)
        assert (how.loss, how.iq, how.mix, how.lr) == (Training().loss, Training().iq, Training().mix, Training().lr)


def test_papers_own_trainings_suit_their_sources():
    assert set(SOURCES) == {"gaussian", "nayer", "vae_replay"}
    for name in SOURCES:
        source = plugins.build("calibrators", name, training=True)
        check_feed(source.training, source)
        assert set(source.in_training) <= {f.name for f in fields(source)}
    assert plugins.build("calibrators", "gaussian", training=True).teacher_bn == "batch"
    assert plugins.build("calibrators", "gaussian").teacher_bn == "running"
    assert plugins.build("calibrators", "vae_replay:steps=3", training=True).steps == 3
    assert plugins.build("calibrators", "vae_replay", "quick", training=True).steps == 1


@pytest.mark.parametrize(
    ("text", "says", "kind"),
    [
        ("epoch=3", "did you mean 'epochs'", PluginError),
        ("epochs=-1", "at least 0", SpecError),
        ("steps=0", "at least 1", SpecError),
        ("batch_size=1", "at least 2", SpecError),
        ("lr=0", "above 0", SpecError),
        ("lr=nan", "not a valid float", PluginError),
        ("mix=-1", "0 or more", SpecError),
        ("loss=l2", "one of kl, l1", PluginError),
        ("feed=river", "one of set, pool, stream", PluginError),
        ("3", "has no option", PluginError),
    ],
)
def test_bad_options(text, says, kind):
    with pytest.raises(kind, match=says):
        read_training(text, Training(), "full")


def test_a_fixed_set_cannot_flow():
    with pytest.raises(SpecError, match="gaussian, nayer, vae_replay"):
        check_feed(Training(feed="stream"), plugins.build("calibrators", "genie"))
    with pytest.raises(SpecError, match="fixed set"):
        check_feed(Training(feed="pool"), object())
    assert math.isfinite(Training().lr)
