"""Requests to predict and their replies: the rows of "Requests and replies observed" and of upstream's JSON tests."""

from __future__ import annotations

import base64
import gzip
import json

import pytest


def test_row_format(rest):
    """A reply in another shape than the request's, or with other white space than TensorFlow Serving's."""
    answer = rest.predict({"instances": ["hello"]})
    assert (answer.status, answer.body) == (200, b'{\n    "predictions": ["hello world"\n    ]\n}')


def test_columnar_format(rest):
    """A columnar request that is answered as "predictions"."""
    assert rest.predict({"inputs": ["hello"]}).json == {"outputs": ["hello world"]}
    assert rest.predict({"inputs": {"prompt": ["hello"]}}).json == {"outputs": ["hello world"]}


def test_headers_of_a_reply(rest):
    """A charset or a second content type, which strict clients refuse."""
    assert rest.predict({"inputs": ["hello"]}).headers["Content-Type"] == "application/json"


def test_content_type_of_the_request_is_ignored(rest):
    """curl's default content type being refused, or parsed as a form."""
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    assert rest.predict({"inputs": ["a"]}, **headers).status == 200


def test_unknown_key_is_ignored_in_columnar_format_only(rest):
    """A columnar request refused for a key too many, or a row request that loses one without a word."""
    assert rest.predict({"inputs": {"prompt": ["x"], "zzz": [1]}}).status == 200
    answer = rest.predict({"instances": [{"prompt": "x", "zzz": 1}]})
    assert answer.status == 400
    assert answer.error == (
        "Failed to process element: 0 key: zzz of 'instances' list. Error: INVALID_ARGUMENT: "
        "JSON object: does not have named input: zzz"
    )


def test_neither_rank_nor_shape_is_checked(rest):
    """A check of static shapes, by which the embedded server would refuse what the real one runs."""
    assert rest.predict({"inputs": "hello"}).json == {"outputs": "hello world"}
    assert rest.predict({"instances": [["a"]]}).json == {"predictions": [["a world"]]}
    answer = rest.predict({"signature_name": "float32_2", "instances": [[1, 2, 3]]}, "same")
    assert answer.json == {"predictions": [[1.0, 2.0, 3.0]]}


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("", "JSON Parse error: The document is empty"),
        ('{"instances":["a"', "JSON Parse error: Missing a comma or ']' after an array element. at offset: 17"),
        ('["a"]', 'JSON Value: ["a"] Is not object'),
        ("this is not json", "JSON Parse error: Invalid value. at offset: 1"),
        ('{"instances":["\\ud83d"]}', "JSON Parse error: The surrogate pair in string is invalid. at offset: 15"),
        ('{"instances":["\\ud83dx"]}', "JSON Parse error: The surrogate pair in string is invalid. at offset: 15"),
        ('{"instances":["a\nb"]}', "JSON Parse error: Invalid encoding in string. at offset: 16"),
        ('{"instances":["a', "JSON Parse error: Missing a closing quotation mark in string. at offset: 16"),
        ('{"instances":["\\x"]}', "JSON Parse error: Invalid escape character in string. at offset: 15"),
        ('{"instances" 1}', "JSON Parse error: Missing a colon after a name of object member. at offset: 13"),
        ('{"instances":1e999}', "JSON Parse error: Number too big to be stored in double. at offset: 13"),
        ('{"inputs":%s}' % ("1" * 400), "JSON Parse error: Number too big to be stored in double. at offset: 10"),
        ("{1:2}", "JSON Parse error: Missing a name for object member. at offset: 1"),
        ("{}", "Missing 'inputs' or 'instances' key"),
        (
            {"instances": []},
            "JSON Value: {\n    \"instances\": []\n} No values in 'instances' array",
        ),
        (
            {"instances": "abc"},
            'JSON Value: {\n    "instances": "abc"\n} Expecting \'instances\' to be an list/array',
        ),
        (
            {"instances": ["a"], "inputs": ["a"]},
            'JSON Value: {\n    "instances": ["a"],\n    "inputs": ["a"]\n} Not formatted correctly expecting only one '
            "of 'inputs' or 'instances' keys to exist ",
        ),
        (
            {"signature_name": None, "inputs": 1},
            'JSON Value: {\n    "signature_name": null,\n    "inputs": 1\n} not formatted correctly. '
            "'signature_name' key must be a string value.",
        ),
        ({"signature_name": "nope", "inputs": 1}, 'Serving signature name: "nope" not found in signature def'),
        (
            {"instances": [1]},
            "Failed to process element: 0 of 'instances' list. Error: INVALID_ARGUMENT: JSON Value: 1 Type: Number "
            "is not of expected type: string",
        ),
        (
            {"instances": [None]},
            "Failed to process element: 0 of 'instances' list. Error: INVALID_ARGUMENT: JSON Value: null Type: Null "
            "is not of expected type: string",
        ),
        (
            {"instances": [{"b64": "###"}]},
            "Failed to process element: 0 of 'instances' list. Error: INVALID_ARGUMENT: Unable to base64 decode",
        ),
        (
            {"instances": ["a", ["b"]]},
            "Failed to process element: 1 of 'instances' list. Error: INVALID_ARGUMENT: "
            "Expecting shape [] but got: [1]",
        ),
        (
            {"instances": [["a", "b"], ["a", "b", "c"]]},
            "Failed to process element: 1 of 'instances' list. Error: INVALID_ARGUMENT: "
            "Expecting tensor size: 2 but got: 3",
        ),
        ({"instances": ["a", {"prompt": "b"}]}, "Expecting value/list but got object at item 1 of input list"),
        ({"instances": [{"prompt": "b"}, "a"]}, "Expecting object but got list at item 1 of input list"),
    ],
)
def test_request_errors(rest, body, error):
    """A message that differs from TensorFlow Serving's, on which a client or an alert may match."""
    answer = rest.predict(body)
    assert (answer.status, answer.error) == (400, error)


@pytest.mark.parametrize("value", [1.0, 99999999999, True, "1"])
def test_int32_takes_integers_that_fit(rest, value):
    """A number that is rounded or cut without a word."""
    answer = rest.predict({"signature_name": "int32", "instances": [value]}, "same")
    assert answer.status == 400
    assert answer.error.endswith("is not of expected type: int32")


def test_blank_around_and_garbage_behind_the_document(rest):
    """A newline at either end, or what follows the object, being refused."""
    assert rest.predict(' \n{"inputs":["a"]} trailing } garbage').json == {"outputs": ["a world"]}


def test_first_of_two_equal_keys_counts(rest):
    """Another reading of a repeated key than the real server's."""
    assert rest.predict('{"inputs":["a"],"inputs":["b"]}').json == {"outputs": ["a world"]}


def test_nul_and_surrogate_pairs_pass(rest):
    """A string cut at NUL, or an escaped emoji refused."""
    assert rest.predict('{"inputs":["\\u0000a", "\\ud83d\\ude00"]}').json == {"outputs": ["\0a world", "😀 world"]}


def test_invalid_utf8_passes_raw(rest):
    """Bytes that are replaced on the way: the graph would not see what was sent."""
    answer = rest.predict(b'{"inputs":["\xff"]}')
    assert answer.body == b'{\n    "outputs": [\n        "\xff world"\n    ]\n}'


def test_output_named_bytes_is_base64(rest):
    """A binary output that comes out as text."""
    answer = rest.predict({"signature_name": "raw", "instances": [{"b64": base64.b64encode(b"\xff\0").decode()}]})
    (row,) = json.loads(answer.body.decode("latin-1"))["predictions"]
    assert row == {"raw": "\xff\0", "raw_bytes": {"b64": "/wA="}}


def test_base64_shapes(rest):
    """{"b64"} taken for an object of named inputs, in lists or by name."""
    hello = {"b64": base64.b64encode(b"hello").decode()}
    assert rest.predict({"instances": [hello, "a"]}).json == {"predictions": ["hello world", "a world"]}
    assert rest.predict({"instances": [[hello], [hello]]}).json == {"predictions": [["hello world"]] * 2}
    assert rest.predict({"instances": [{"prompt": [[hello, hello]]}]}).json == {
        "predictions": [[["hello world", "hello world"]]]
    }
    assert rest.predict({"inputs": hello}).json == {"outputs": "hello world"}


def test_defaults_are_not_for_rest(rest):
    """Defaults of a signature filled in over REST: the request would then fail on the real server."""
    row = rest.predict({"signature_name": "params", "instances": [{"prompt": "a", "n": 1}]})
    assert (row.status, row.error) == (
        400,
        "Failed to process element: 0 of 'instances' list. JSON object: "
        '{\n    "prompt": "a",\n    "n": 1\n} keys must be equal to: n,prompt,temp',
    )
    columnar = rest.predict({"signature_name": "params", "inputs": {"prompt": ["a"], "n": [1]}})
    assert columnar.error == "Missing named input: temp in 'inputs' object."
    plain = rest.predict({"signature_name": "params", "instances": ["a"]})
    assert plain.error == (
        "instances is a plain list, but expecting list of objects as multiple input tensors required as per "
        "tensorinfo_map"
    )
    plain = rest.predict({"signature_name": "params", "inputs": ["a"]})
    assert plain.error == (
        "inputs is a plain value/list, but expecting an object as multiple input tensors required as per tensorinfo_map"
    )


def test_several_inputs(rest):
    """Columns that get into each other's place, or mixed shapes refused in columnar format."""
    row = rest.predict({"signature_name": "params", "instances": [{"prompt": "a", "n": 1, "temp": 0.25}] * 2})
    assert row.json == {"predictions": [{"text": "a!", "n": 1, "temp": 0.25}] * 2}
    columnar = rest.predict({"signature_name": "params", "inputs": {"prompt": ["a", "b"], "n": [1], "temp": 0.5}})
    assert columnar.json == {"outputs": {"text": ["a!", "b!"], "n": [1], "temp": 0.5}}


def test_row_request_needs_a_batch(rest):
    """A scalar output spread over the rows, or rows cut to the shortest output."""
    scalar = rest.predict({"signature_name": "scalar", "instances": ["a"]})
    assert (scalar.status, scalar.error) == (400, "Tensor name: count has no shape information ")
    twice = rest.predict({"signature_name": "twice", "instances": ["a"]})
    assert twice.status == 400
    assert "inconsistent batch size" in twice.error
    columnar = rest.predict({"signature_name": "scalar", "inputs": ["a"]})
    assert columnar.json == {"outputs": {"text": ["a"], "count": 1}}


def test_zero_batch(rest):
    """An empty output that fails instead of being an empty list."""
    assert rest.predict({"signature_name": "nothing", "instances": ["a"]}).json == {"predictions": []}
    assert rest.predict({"signature_name": "nothing", "inputs": ["a"]}).json == {"outputs": []}


def test_assertion_in_the_graph(rest):
    """The model's own message lost, or a Python traceback of the graph sent to clients."""
    answer = rest.predict({"signature_name": "guarded", "instances": ["a", "b", "c"]})
    assert answer.status == 400
    assert answer.error.startswith("assertion failed: [at most 2 prompts]")
    assert "\n\t [[{{function_node " in answer.error
    assert "File " not in answer.error


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (9000000, "9e+06"),
        (999999, "999999.0"),
        (0.5, "0.5"),
        (0.0003, "0.0003"),
        (0.00003, "3e-05"),
        (555557.5, "555557.5"),
        (0.1, "0.1"),
        (16777217, "16777216.0"),
        (1435774380, "1.43577434e+09"),
        (1435774380.0, "1.43577434e+09"),
        (3.4028235e39, "Infinity"),
        (1e-60, "0.0"),
    ],
)
def test_floats(rest, value, text):
    """Noise digits, numbers that read as integers, or a float out of range refused."""
    answer = rest.predict({"signature_name": "float32", "instances": [value]}, "same")
    assert answer.body.decode() == f'{{\n    "predictions": [{text}\n    ]\n}}'


def test_doubles(rest):
    """A double that loses digits on the way."""
    values = [0.1, 1 / 3, 1e300, -2, 123456789.123456789]
    assert rest.predict({"signature_name": "float64", "inputs": values}, "same").json == {"outputs": values}


def test_nan_and_infinity(rest):
    """Numbers that are no JSON, but which TensorFlow Serving reads and writes."""
    answer = rest.predict('{"signature_name":"float32","instances":[NaN, Infinity, -Infinity, 3]}', "same")
    assert answer.body == b'{\n    "predictions": [NaN, Infinity, -Infinity, 3.0\n    ]\n}'


@pytest.mark.parametrize(
    ("signature", "values"),
    [
        ("int32", [-(2**31), 2**31 - 1]),
        ("int64", [-(2**63), 2**63 - 1]),
        ("uint8", [0, 255]),
        ("uint32", [0, 2**32 - 1]),
        ("uint64", [0, 2**64 - 1]),
        ("bool", [True, False]),
        ("string", ['a"\\\n', "é"]),
    ],
)
def test_types(rest, signature, values):
    """A type whose values change on the way in or out."""
    assert rest.predict({"signature_name": signature, "instances": values}, "same").json == {"predictions": values}


def test_type_without_json(rest):
    """An output that JSON cannot say failing as an internal error."""
    answer = rest.predict({"signature_name": "complex", "instances": [1]}, "same")
    assert (answer.status, answer.error) == (400, "Failed to write JSON value for tensor type: complex64")


def test_nested_lists(rest):
    """Rows and columns exchanged in a tensor of two dimensions."""
    instances = [[1, 2], [3, 4], [5, 6]]
    answer = rest.predict({"signature_name": "int32_2", "instances": instances}, "same")
    assert answer.body == b'{\n    "predictions": [[1, 2], [3, 4], [5, 6]\n    ]\n}'


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ([[1, 2], [3]], "Encountered list at unexpected size: 1 at level: 1 expected size: 2"),
        ([1, [2]], "Encountered list at unexpected level: 1 expected < 1"),
        ([[1], 2], "JSON Value: 2 found at incorrect level: 2 in the JSON DOM. Expected at level: 2"),
        ([{"a": 1}], 'JSON Value: {\n    "a": 1\n} Type: Object is not of expected type: int32'),
    ],
)
def test_ragged_tensor(rest, value, error):
    """A ragged tensor that is padded, or that fails as an internal error."""
    answer = rest.predict({"signature_name": "int32", "inputs": value}, "same")
    assert (answer.status, answer.error) == (400, error)


@pytest.mark.parametrize("depth", [900, 100_000, 500_000])
def test_deeply_nested(rest, server, depth):
    """A body of brackets that ends the process, as it does TensorFlow Serving's, or keeps it busy."""
    nested = "[" * depth + "]" * depth
    assert rest.predict(f'{{"ignored":{nested},"instances":["a"]}}').json == {"predictions": ["a world"]}
    answer = rest.predict(f'{{"signature_name":{nested},"instances":["a"]}}')
    assert (answer.status, "key must be a string value" in answer.error) == (400, True)
    assert rest.predict(f'{{"instances":{nested}}}').error == (
        "Failed to process element: 0 of 'instances' list. Error: INVALID_ARGUMENT: tensor parsing error: prompt"
    )
    assert rest.predict("[" * depth).error.startswith("JSON Parse error: Invalid value. at offset: ")
    objects = '{"a":' * depth + "1" + "}" * depth
    assert rest.predict(f'{{"instances":[{objects}]}}').status == 400
    assert rest.predict({"instances": ["a"]}).status == 200


def test_gzip(rest):
    """A compressed request being parsed as it is, or a compressed reply to who did not ask."""
    body = gzip.compress(b'{"inputs":["a"]}')
    answer = rest.predict(body, **{"Content-Encoding": "gzip", "Accept-Encoding": "gzip"})
    assert answer.json == {"outputs": ["a world"]}
    assert "Content-Encoding" not in answer.headers


def test_gzip_bomb(rest, server):
    """A small body that fills the memory."""
    bomb = gzip.compress(b" " * (101 * 2**20) + b'{"inputs":["a"]}')
    answer = rest.predict(bomb, **{"Content-Encoding": "gzip"})
    assert (answer.status, answer.error) == (413, "The request is larger than 104857600 bytes")


WHOLE = gzip.compress(b'{"inputs":["a"]}', mtime=0)


@pytest.mark.parametrize("body", [WHOLE + b"x", WHOLE * 2, WHOLE[:-3], WHOLE[:-8] + bytes(8), b'{"inputs":["a"]}'])
def test_gzip_with_something_wrong(rest, body):
    """Data after the compressed body that is ignored, or half a body that is run."""
    answer = rest.predict(body, **{"Content-Encoding": "gzip"})
    assert (answer.status, answer.error) == (400, "JSON Parse error: The document is empty")


def test_lone_low_surrogate_passes(rest):
    """The second half of a surrogate pair, which the real server takes alone, being refused."""
    answer = rest.predict('{"inputs":["\\ude42"]}')
    assert (answer.status, b'"\xed\xb9\x82 world"' in answer.body) == (200, True)


@pytest.mark.parametrize("text", ["aGVs bG8=", "aGVs\nbG8", " aGVsbG8 ", "aGVsbG8", "aGVsbG8."])
def test_base64_with_white_space_or_without_padding(rest, text):
    """Base64 that was broken into lines, or lacks its padding, being refused."""
    assert rest.predict({"inputs": [{"b64": text}]}).json == {"outputs": ["hello world"]}


@pytest.mark.parametrize("text", ["aGVsbA=", "aGVsbG8==", "=", "a", "a-_b", "aGVsbG8=aGVs"])
def test_base64_that_is_wrong(rest, text):
    """Base64 with half of its padding, or of another alphabet, being read in some way."""
    assert rest.predict({"inputs": [{"b64": text}]}).error == "Unable to base64 decode"
