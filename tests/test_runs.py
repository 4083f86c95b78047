"""The log of a run."""

import logging

from medldm.runs import log_to


def test_the_log_of_a_second_run_in_one_process_does_not_go_to_the_first(tmp_path):
    log = logging.getLogger("medldm.test")
    for name in ("first", "second"):
        log_to(tmp_path / name)
        log.warning("said by the %s", name)
    assert (tmp_path / "first").read_text().count("said by") == 1
    assert (tmp_path / "second").read_text().endswith("medldm.test: said by the second\n")
