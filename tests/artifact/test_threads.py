"""Work that was begun with so many threads goes on with as many; what is finished is kept."""

import json

import pytest
import torch

from qquant import pipeline
from qquant.artifact.threads import RECORD, as_begun
from qquant.errors import StoppedError
from qquant.ranks import ALONE
from tests.worlds.builds import CPU


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_work_goes_on_with_as_many(tmp_path, caplog):
    with as_begun(tmp_path, CPU, ALONE) as agreed:
        assert agreed == {"number of threads": "2"}
    assert not caplog.messages
    torch.set_num_threads(1)
    with as_begun(tmp_path, CPU, ALONE) as agreed:
        assert torch.get_num_threads() == 2
        assert agreed == {"number of threads": "2"}
    assert torch.get_num_threads() == 1, "as the caller had it"
    (message,) = caplog.messages
    assert f"{tmp_path} was begun with 2 thread(s) and goes on with as many, not 1" in message


@pytest.mark.parametrize("content", ["", "{", "[2]", '{"threads": 0}', '{"threads": true}', '{"threads": 1e9}', "{}"])
def test_a_record_that_makes_no_sense_is_written_again(tmp_path, content):
    (tmp_path / RECORD).write_text(content)
    with as_begun(tmp_path, CPU, ALONE):
        assert torch.get_num_threads() == 2
    assert json.loads((tmp_path / RECORD).read_text()) == {"threads": 2}


def test_a_gpu_does_not_ask(tmp_path):
    with as_begun(tmp_path, torch.device("cuda"), ALONE) as agreed:
        assert agreed == {}
    assert not (tmp_path / RECORD).exists()


def test_a_build_goes_on_with_as_many_and_keeps_what_is_finished(make_checkpoint, build, monkeypatch):
    folder, seen, quantize = make_checkpoint(), [], pipeline.walk.quantize

    def quantizing(source, samples, drafts, *rest):
        seen.append((torch.get_num_threads(), len(drafts)))
        if len(seen) == 1:
            raise StoppedError("a signal came")
        quantize(source, samples, drafts, *rest)

    monkeypatch.setattr(pipeline.walk, "quantize", quantizing)
    with pytest.raises(StoppedError):
        build(folder, "rtn")
    torch.set_num_threads(1)
    build(folder, "rtn")
    assert torch.get_num_threads() == 1
    build(folder, "rtn")
    assert seen == [(2, 1), (2, 1), (1, 0)]
