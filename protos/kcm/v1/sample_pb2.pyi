from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class HintArm(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    HINT_ARM_UNSPECIFIED: _ClassVar[HintArm]
    HINT_NONE: _ClassVar[HintArm]
    HINT_CANDIDATES: _ClassVar[HintArm]
    HINT_ASSERTION: _ClassVar[HintArm]
HINT_ARM_UNSPECIFIED: HintArm
HINT_NONE: HintArm
HINT_CANDIDATES: HintArm
HINT_ASSERTION: HintArm

class Payload(_message.Message):
    __slots__ = ("text", "image", "tensors")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    text: str
    image: bytes
    tensors: Tensors
    def __init__(self, text: _Optional[str] = ..., image: _Optional[bytes] = ..., tensors: _Optional[_Union[Tensors, _Mapping]] = ...) -> None: ...

class Tensors(_message.Message):
    __slots__ = ("inputs",)
    class InputsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    inputs: _containers.ScalarMap[str, bytes]
    def __init__(self, inputs: _Optional[_Mapping[str, bytes]] = ...) -> None: ...

class Scores(_message.Message):
    __slots__ = ("label_space", "kind", "dtype", "values", "ids", "rest_logprob")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[Scores.Kind]
        LOGIT: _ClassVar[Scores.Kind]
        LOGPROB: _ClassVar[Scores.Kind]
        PMI: _ClassVar[Scores.Kind]
    KIND_UNSPECIFIED: Scores.Kind
    LOGIT: Scores.Kind
    LOGPROB: Scores.Kind
    PMI: Scores.Kind
    class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        DTYPE_UNSPECIFIED: _ClassVar[Scores.DType]
        FLOAT32: _ClassVar[Scores.DType]
        FLOAT16: _ClassVar[Scores.DType]
    DTYPE_UNSPECIFIED: Scores.DType
    FLOAT32: Scores.DType
    FLOAT16: Scores.DType
    LABEL_SPACE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    REST_LOGPROB_FIELD_NUMBER: _ClassVar[int]
    label_space: str
    kind: Scores.Kind
    dtype: Scores.DType
    values: bytes
    ids: _containers.RepeatedScalarFieldContainer[int]
    rest_logprob: float
    def __init__(self, label_space: _Optional[str] = ..., kind: _Optional[_Union[Scores.Kind, str]] = ..., dtype: _Optional[_Union[Scores.DType, str]] = ..., values: _Optional[bytes] = ..., ids: _Optional[_Iterable[int]] = ..., rest_logprob: _Optional[float] = ...) -> None: ...

class Hint(_message.Message):
    __slots__ = ("label_ids", "probabilities", "confidence")
    LABEL_IDS_FIELD_NUMBER: _ClassVar[int]
    PROBABILITIES_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    label_ids: _containers.RepeatedScalarFieldContainer[int]
    probabilities: _containers.RepeatedScalarFieldContainer[float]
    confidence: float
    def __init__(self, label_ids: _Optional[_Iterable[int]] = ..., probabilities: _Optional[_Iterable[float]] = ..., confidence: _Optional[float] = ...) -> None: ...
