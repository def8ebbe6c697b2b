"""A few of the trials of `campaign.py`, which a maintainer runs by the hundred."""

import campaign
import pytest

# Bases and adapters of the trials are trained once.


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return campaign.make_place(tmp_path_factory.mktemp("campaign"))


def test_bad_inputs_are_taken_as_written_or_refused_in_a_line(place):
    assert campaign.try_inputs(place, 11, 16).failures == []


def test_killed_runs_leave_whole_folders_and_go_on_bit_for_bit(place):
    assert campaign.try_kills(place, 11, 3, "training and save, feature cache, push").failures == []


def test_hostile_texts_stay_texts(place):
    assert campaign.try_texts(place, 11, 6).failures == []
