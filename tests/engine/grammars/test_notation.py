"""What is compiled, and what is said of what is not: in a line, with the place."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsrpc.constraint import Choice, Constraint, Grammar, JsonObject, JsonSchema, Regex
from hsrpc.engine.grammars.notation import compilable, read_constraint
from hsrpc.engine.grammars.trial import Trial
from hsrpc.errors import InvalidRequestError

KINDS: tuple[Constraint, ...] = (
    JsonSchema({"type": "array", "items": {"$ref": "#/$defs/x"}, "$defs": {"x": {"type": "integer"}}}),
    JsonSchema("true"),
    JsonObject(),
    Regex(r"[a-z]+/\d{2}"),
    Grammar('start: "a" start | NUMBER\nNUMBER: /[0-9]+/'),
    Grammar('root ::= item+\nitem ::= "a" | [0-9]'),
    Choice(("a", '"b"\n', "é|\\", "\x01")),
)
WRONG = (
    (JsonSchema({"properties": {"a": {"items": {"anyOf": [{}, {"type": "text"}]}}}}), "at /properties/a/items/anyOf/1"),
    (JsonSchema({"properties": {"a/b": {"pattern": "x(("}}}), "at /properties/a~1b: unclosed group, at character 2"),
    (JsonSchema({"items": {"$ref": "#/$defs/y"}, "$defs": {"y": {"uniqueItems": True}}}), "at /items: Unimplemented"),
    (JsonSchema({"$ref": "https://example.com/schema"}), "at the root: Resource 'https://example.com/schema'"),
    (JsonSchema({"prefixItems": [{}, {"type": "bar"}]}), "at /prefixItems/1: Invalid type: bar"),
    (JsonSchema(False), "at the root: Unsatisfiable"),
    (JsonSchema({"x-guidance": {"whitespace_flexible": "no"}}), "expected a boolean"),
    (Regex("ab("), "unclosed group, at character 2 of the expression"),
    (Regex(r"a(?=b)"), "look-around, including look-ahead and look-behind, is not supported, at character 1"),
    (Regex("a{5,2}"), "invalid repetition count range"),
    (Grammar('start: a\na: b "x"'), 'line 2, column 4: unknown name: "b"'),
    (Grammar('begin: "x"'), "no start"),
    (Grammar('root ::= ("a"'), "Expected ')'"),
    (Grammar("start: A\nA: /[/"), "line 2, column 4: unclosed character class"),
)


@pytest.mark.parametrize("constraint", KINDS, ids=lambda each: type(each).__name__)
def test_each_kind_is_compiled(constraint):
    """And is the same after its way to another process."""
    assert compilable(constraint) == compilable(read_constraint(constraint.field, constraint.text))


@pytest.mark.parametrize(("constraint", "words"), WRONG, ids=lambda each: getattr(each, "text", "")[:30])
def test_what_is_wrong_is_told_with_its_place(constraint, words):
    """In schemas a JSON pointer, in grammars line and column, in expressions a character."""
    with pytest.raises(InvalidRequestError) as caught:
        compilable(constraint)
    assert caught.value.field == constraint.field
    assert words in caught.value.description
    assert "\n" not in caught.value.description
    assert len(caught.value.description) < 450


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: JsonSchema('{"type": '), "json_schema: not JSON"),
        (lambda: JsonSchema("[" * 50_000), "json_schema: nested too deeply"),
        (lambda: JsonSchema("3"), "json_schema: a JSON int"),
        (lambda: JsonSchema({"const": object()}), "json_schema: not JSON"),
        (lambda: Regex(""), "regex: empty"),
        (lambda: Regex("a" * 131_073), "regex: 131073 bytes; at most 131072"),
        (lambda: Grammar("\ud800"), "grammar: half of a surrogate pair"),
        (lambda: Choice(()), "choice: 0 texts; give 1 to 1024"),
        (lambda: Choice("yes"), "choice: one string; give a list"),
        (lambda: Choice(["a", ""]), r"choice\[1\]: empty"),
        (lambda: Choice(["a" * 1000] * 200), "choice: .* bytes in all"),
        (lambda: Choice(["a", 3]), r"choice\[1\]: '3' is no string"),
    ],
)
def test_what_no_constraint_can_be_is_refused_when_it_is_made(make, words):
    """Before anything is done for it."""
    with pytest.raises(InvalidRequestError, match=words):
        make()


@pytest.fixture
def trial():
    made = Trial(0.5)
    yield made
    made.close()


SLOW = JsonSchema({"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{n + 5}}}$"} for n in range(30)]})
DEEP = Grammar("start: r0\n" + "".join(f"r{n}: r{n + 1} |\n" for n in range(7000)) + 'r7000: "c"')


def test_what_would_take_for_ever_is_given_up(trial):
    """It is refused, and the next one is compiled as if nothing had been."""
    assert trial.compilable(Regex("a+"))
    with pytest.raises(InvalidRequestError, match=r"json_schema: takes longer than 0\.5 s to compile"):
        trial.compilable(SLOW)
    assert trial.compilable(Regex("a+"))
    with pytest.raises(InvalidRequestError, match="regex: unclosed group"):
        trial.compilable(Regex("("))


def test_what_nests_deeply_has_the_stack_for_it(trial):
    """A thread of the usual size would end the process."""
    assert trial.compilable(DEEP)


TEXTS = st.text(
    st.sampled_from("ab01()[]{}|*+?.,\\^$\"'/:=<> \n\td%&~-é") | st.characters(exclude_categories=["Cs"]), max_size=40
)
WORDS = (
    *("type", "properties", "items", "anyOf", "allOf", "oneOf", "$ref", "$defs", "enum", "const", "pattern", "minimum"),
    *("maxLength", "required", "additionalProperties", "format", "not", "x-guidance", "prefixItems"),
)
SCHEMAS = st.recursive(
    st.sampled_from([True, False, None, 3, "string", "integer", "object", "array", "a+(", "#", "date"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4),
    max_leaves=10,
)


def test_whatever_it_is_there_is_an_answer(trial):
    """It is compiled or refused, in words, whatever the text."""

    @settings(max_examples=200, deadline=None)
    @given(st.one_of(st.builds(Regex, TEXTS.filter(bool)), st.builds(Grammar, TEXTS.filter(bool)), SCHEMAS))
    def answered(made: object) -> None:
        try:
            constraint = made if isinstance(made, Regex | Grammar) else JsonSchema(json.dumps(made))
            answer = trial.compilable(constraint)
        except InvalidRequestError as error:
            answer = error.description
        assert answer
        assert "takes too much memory" not in answer

    answered()


def test_a_process_that_ends_is_followed_by_another(trial):
    """Whatever ended it; the constraint that it was busy with is refused."""
    assert trial.compilable(Regex("a+"))
    trial._process.kill()
    trial._process.wait()
    assert trial.compilable(Regex("b+"))
