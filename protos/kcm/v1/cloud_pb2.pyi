from protos.kcm.v1 import sample_pb2 as _sample_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Purpose(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PURPOSE_UNSPECIFIED: _ClassVar[Purpose]
    LIVE: _ClassVar[Purpose]
    BACKFILL: _ClassVar[Purpose]
    EXPLORE: _ClassVar[Purpose]
    SHADOW: _ClassVar[Purpose]
PURPOSE_UNSPECIFIED: Purpose
LIVE: Purpose
BACKFILL: Purpose
EXPLORE: Purpose
SHADOW: Purpose

class PredictSample(_message.Message):
    __slots__ = ("sample_id", "purpose", "p_escalate", "hint", "payload", "small", "confidence", "bundle_id", "p_hint")
    SAMPLE_ID_FIELD_NUMBER: _ClassVar[int]
    PURPOSE_FIELD_NUMBER: _ClassVar[int]
    P_ESCALATE_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    SMALL_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_ID_FIELD_NUMBER: _ClassVar[int]
    P_HINT_FIELD_NUMBER: _ClassVar[int]
    sample_id: str
    purpose: Purpose
    p_escalate: float
    hint: _sample_pb2.Hint
    payload: _sample_pb2.Payload
    small: _sample_pb2.Scores
    confidence: float
    bundle_id: str
    p_hint: float
    def __init__(self, sample_id: _Optional[str] = ..., purpose: _Optional[_Union[Purpose, str]] = ..., p_escalate: _Optional[float] = ..., hint: _Optional[_Union[_sample_pb2.Hint, _Mapping]] = ..., payload: _Optional[_Union[_sample_pb2.Payload, _Mapping]] = ..., small: _Optional[_Union[_sample_pb2.Scores, _Mapping]] = ..., confidence: _Optional[float] = ..., bundle_id: _Optional[str] = ..., p_hint: _Optional[float] = ...) -> None: ...

class PredictRequest(_message.Message):
    __slots__ = ("edge_id", "task_id", "label_space", "samples")
    EDGE_ID_FIELD_NUMBER: _ClassVar[int]
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    LABEL_SPACE_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    edge_id: str
    task_id: str
    label_space: str
    samples: _containers.RepeatedCompositeFieldContainer[PredictSample]
    def __init__(self, edge_id: _Optional[str] = ..., task_id: _Optional[str] = ..., label_space: _Optional[str] = ..., samples: _Optional[_Iterable[_Union[PredictSample, _Mapping]]] = ...) -> None: ...

class Prediction(_message.Message):
    __slots__ = ("sample_id", "label_id", "label", "scores", "hint_arm", "stored")
    SAMPLE_ID_FIELD_NUMBER: _ClassVar[int]
    LABEL_ID_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    HINT_ARM_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    sample_id: str
    label_id: int
    label: str
    scores: _sample_pb2.Scores
    hint_arm: _sample_pb2.HintArm
    stored: bool
    def __init__(self, sample_id: _Optional[str] = ..., label_id: _Optional[int] = ..., label: _Optional[str] = ..., scores: _Optional[_Union[_sample_pb2.Scores, _Mapping]] = ..., hint_arm: _Optional[_Union[_sample_pb2.HintArm, str]] = ..., stored: bool = ...) -> None: ...

class PredictReply(_message.Message):
    __slots__ = ("teacher_id", "prompt_id", "predictions")
    TEACHER_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_ID_FIELD_NUMBER: _ClassVar[int]
    PREDICTIONS_FIELD_NUMBER: _ClassVar[int]
    teacher_id: str
    prompt_id: str
    predictions: _containers.RepeatedCompositeFieldContainer[Prediction]
    def __init__(self, teacher_id: _Optional[str] = ..., prompt_id: _Optional[str] = ..., predictions: _Optional[_Iterable[_Union[Prediction, _Mapping]]] = ...) -> None: ...

class TrueLabel(_message.Message):
    __slots__ = ("sample_id", "label_id")
    SAMPLE_ID_FIELD_NUMBER: _ClassVar[int]
    LABEL_ID_FIELD_NUMBER: _ClassVar[int]
    sample_id: str
    label_id: int
    def __init__(self, sample_id: _Optional[str] = ..., label_id: _Optional[int] = ...) -> None: ...

class LabelRequest(_message.Message):
    __slots__ = ("edge_id", "task_id", "label_space", "labels")
    EDGE_ID_FIELD_NUMBER: _ClassVar[int]
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    LABEL_SPACE_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    edge_id: str
    task_id: str
    label_space: str
    labels: _containers.RepeatedCompositeFieldContainer[TrueLabel]
    def __init__(self, edge_id: _Optional[str] = ..., task_id: _Optional[str] = ..., label_space: _Optional[str] = ..., labels: _Optional[_Iterable[_Union[TrueLabel, _Mapping]]] = ...) -> None: ...

class LabelReply(_message.Message):
    __slots__ = ("stored",)
    STORED_FIELD_NUMBER: _ClassVar[int]
    stored: int
    def __init__(self, stored: _Optional[int] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeReply(_message.Message):
    __slots__ = ("task_id", "label_space", "teacher_id", "prompt_id", "reads_hints", "max_samples")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    LABEL_SPACE_FIELD_NUMBER: _ClassVar[int]
    TEACHER_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_ID_FIELD_NUMBER: _ClassVar[int]
    READS_HINTS_FIELD_NUMBER: _ClassVar[int]
    MAX_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    label_space: str
    teacher_id: str
    prompt_id: str
    reads_hints: bool
    max_samples: int
    def __init__(self, task_id: _Optional[str] = ..., label_space: _Optional[str] = ..., teacher_id: _Optional[str] = ..., prompt_id: _Optional[str] = ..., reads_hints: bool = ..., max_samples: _Optional[int] = ...) -> None: ...
