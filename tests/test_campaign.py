"""A few of the trials of `campaign.py`, which a maintainer runs by the hundred."""

import random

import campaign
import pytest

# Bases and adapters of the trials are trained once.


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return campaign.make_place(tmp_path_factory.mktemp("campaign"))


def failures(trials, place, seed, count, *kinds):
    tally = campaign.Tally("test", seed)
    trials(place, tally, count, *kinds)
    assert sum(tally.tried.values()) == count
    return tally.failures


def test_bad_inputs_are_taken_as_written_or_refused_in_a_line(place):
    assert failures(campaign.try_inputs, place, 11, 16) == []


def test_killed_runs_leave_whole_folders_and_go_on_bit_for_bit(place):
    assert failures(campaign.try_kills, place, 11, 3, "training and save, feature cache, push") == []


def test_hostile_texts_stay_texts(place):
    assert failures(campaign.try_texts, place, 11, 6) == []


def test_a_turned_picture_of_any_format_can_be_drawn(tmp_path):
    # A compressed TIFF with orientation 9.
    trial = campaign.picture_trial(random.Random("14 253"), tmp_path)
    assert trial.said.startswith("TIFF")
    assert "turned 9" in trial.said
    assert campaign.problem_of(trial) is None


def test_a_stopped_campaign_goes_on_with_what_it_found(tmp_path):
    file = tmp_path / "results.jsonl"
    first = campaign.Tally("inputs", 1, file)
    first.count(0, "table", "a", None)
    first.count(2, "picture", "b", "taken")
    campaign.Tally("inputs", 2, file).count(1, "table", "c", None)
    with file.open("a") as end:
        end.write('{"campaign": "inputs", "se')
    again = campaign.Tally("inputs", 1, file)
    assert again.remaining(4) == [1, 3]
    assert again.failures == ["picture: b: taken"]
    assert again.lines() == first.lines()
    again.count(1, "table", "d", None)
    assert campaign.Tally("inputs", 1, file).remaining(4) == [3]
