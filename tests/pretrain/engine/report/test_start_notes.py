"""A start says what it is doing, every few seconds, from its command to its first step."""

import logging
import time

from pretrain.engine.report.start_notes import EVERY_S, StartNotes


def test_notes_until_the_first_step(capsys):
    with StartNotes("tiny", speaks=True, every_s=0.05) as notes:
        assert capsys.readouterr().err == "INFO starting tiny: importing torch and DeepSpeed\n"
        notes.enter("opening shards")
        time.sleep(0.2)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) >= 2 and set(lines) == {"INFO starting tiny: opening shards (0 s)"}
        notes.close()
        time.sleep(0.1)
        capsys.readouterr()
        time.sleep(0.15)
    assert capsys.readouterr().err == ""
    assert EVERY_S <= 5


def test_only_one_rank_speaks(capsys):
    with StartNotes("tiny", every_s=0.01):
        time.sleep(0.05)
    assert capsys.readouterr().err == ""


def test_notes_go_to_the_log_once_it_is_open(capsys):
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("omnipretrain")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        with StartNotes("tiny", speaks=True, every_s=0.02) as notes:
            notes.enter("waiting for the first step")
            time.sleep(0.1)
    finally:
        logger.removeHandler(handler)
    assert records[-1] == "starting tiny: waiting for the first step (0 s)"
    assert capsys.readouterr().err == ""
