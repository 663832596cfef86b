"""Records that are written out by hand are those that the codec makes."""

from fieldlab_common import wire
from fieldlab_common.lifecycle import Reason, StepState
from fieldlab_common.protocol import Record, StepRecord, Usage, ValueRef
from fieldlab_executor.reports import step_record
from hypothesis import given
from hypothesis import strategies as st

TEXT = st.text(max_size=20)
TIME = st.none() | st.floats(0, 2e9)
VALUES = st.builds(
    ValueRef, format=st.just("json"), json=st.none() | st.lists(TEXT), size=st.integers(0, 9), summary=TEXT
)
USAGE = st.builds(Usage, cpu=st.floats(0, 9), peak_memory=st.integers(0, 9), exit_code=st.none() | st.integers(0, 255))
RECORDS = st.builds(
    StepRecord,
    step=TEXT,
    state=st.sampled_from(StepState),
    settled=st.booleans(),
    attempt=st.integers(1, 3),
    iteration=st.none() | st.integers(0, 3),
    iterations=st.none() | st.integers(0, 3),
    reason=st.none() | st.sampled_from(Reason),
    message=TEXT,
    error=TEXT,
    started=TIME,
    ended=TIME,
    value=st.none() | VALUES,
    usage=st.none() | USAGE,
)


@given(RECORDS, st.floats(0, 2e9))
def test_a_record_of_a_step_is_as_the_codec_writes_it(record: StepRecord, at: float) -> None:
    assert step_record(record, at) == wire.dumps(Record(kind="step", at=at, body=wire.encode(record)))


def test_half_a_character_becomes_a_question_mark() -> None:
    record = StepRecord(step="s", state=StepState.FAILED, message="\ud800")
    assert step_record(record, 1.0) == wire.dumps(Record(kind="step", at=1.0, body=wire.encode(record)))
