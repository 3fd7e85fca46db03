"""Plans of function calls: parser, comparison as graphs, accepted arguments, success, split."""

import itertools

import pytest
from hypothesis import given, settings, strategies as st

from examples.finetuning import plans


END = "\n9. join()<END_OF_PLAN>"
MAIL = '1. find("Sid")\n2. find("Lu")\n3. mail(["$1", "$2"], "Lunch", 12)'


def equal(one: str, other: str, with_arguments: bool = True, end: str = END) -> bool:
    pair = plans.parse(one + end), plans.parse(other + end)
    answers = {plans.same_graph(*p, with_arguments=with_arguments) for p in (pair, pair[::-1])}
    (answer,) = answers  # whichever comes first
    return answer


class TestPlans:
    def test_parsed_plan_is_its_calls(self):
        assert plans.parse(MAIL + END) == [
            (1, "find", ["Sid"], {}, None),
            (2, "find", ["Lu"], {}, None),
            (3, "mail", [["$1", "$2"], "Lunch", 12], {}, None),
        ]
        assert plans.parse("1. now()\n2. say(${1}, x)\n3. join()\n4. no call") == [
            (1, "now", [], {}, None),
            (2, "say", "${1}, x", {}, None),  # no Python: as it is written
        ]

    @pytest.mark.parametrize(
        ("text", "positional", "keywords"),
        [
            ("", [], {}),
            ("x=1", [], {"x": 1}),
            (
                "'a', [1], x=-2.5, y={'b': (True, None)}",
                ["a", [1]],
                {"x": -2.5, "y": {"b": (True, None)}},
            ),
            ("x='f(y=1), z=2'", [], {"x": "f(y=1), z=2"}),
            ("x=1,", [], {"x": 1}),
            *[
                (text, text, {})  # no Python literals, or no single call: the text itself
                for text in (
                    "x=y",
                    "x=1, x=2",
                    "**{'x': 1}",
                    "x=1, 2",
                    "1)(2",
                    "1), f(2",
                    "1) + f(2",
                )
            ],
        ],
    )
    def test_arguments(self, text, positional, keywords):
        assert plans.arguments(text) == (positional, keywords)

    @settings(max_examples=50, deadline=None)
    @given(st.data())
    def test_written_plan_is_parsed(self, data):
        texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="$"))
        values = st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats(allow_nan=False, allow_infinity=False)
            | texts,
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
            max_leaves=5,
        )
        names = st.sampled_from(["f", "math.hypot", "_g2"])
        calls = data.draw(
            st.lists(st.tuples(names, st.dictionaries(st.sampled_from("xyz"), values)))
        )
        parsed = plans.parse(plans.text_of(calls))
        assert [(call.number, call.name) for call in parsed] == [
            (i + 1, name) for i, (name, _) in enumerate(calls)
        ]
        assert [(call.arguments, call.keywords) for call in parsed] == [
            ([], keywords) for _, keywords in calls
        ]
        assert equal(plans.text_of(calls), plans.text_of(calls[::-1]), end="")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("1. find()", "does not end with join"),
            ("Let me see.\n1. join()", "'Let me see.' is not a call"),
            ('1. mail("$2")\n2. find()\n3. join()', "uses $2, which is not an earlier call"),
            ('1. mail("$1")\n2. join()', "uses $1, which is not an earlier call"),
        ],
    )
    def test_invalid_plan_is_refused(self, text, message):
        with pytest.raises(ValueError, match=r".") as error:
            plans.parse(text)
        assert message in str(error.value)

    @pytest.mark.parametrize(
        ("other", "whole", "bare"),
        [
            (MAIL, True, True),
            ('1. find("Lu")\n2. find("Sid")\n3. mail(["$2", "$1"], "Lunch", 12)', True, True),
            ('3. find("Lu")\n5. find("Sid")\n7. mail(["${5}", "$3"], "Lunch", 12)', True, True),
            ('1. find("Sid")\n2. find("Lu")\n3. mail(["$2", "$1"], "Lunch", 12)', False, True),
            ('1. find("Sid")\n2. find("Lu")\n3. mail(["$1", "$2"], "lunch", 12)', False, True),
            ('1. find("Sid")\n2. find("Lu")\n3. mail(["$1"], "Lunch", 12)', False, False),
            ('1. find("Sid")\n2. find("Lu")\n3. send(["$1", "$2"], "Lunch", 12)', False, False),
            ('1. find("Sid")\n2. mail(["$1", "$1"], "Lunch", 12)', False, False),
            (MAIL + '\n4. find("Sid")', False, False),
            (MAIL.replace('"Sid"', 'name="Sid"'), False, True),
            (MAIL.replace("12", "at=12"), False, True),
        ],
        ids=range(11),
    )
    def test_plans_are_compared_as_graphs(self, other, whole, bare):
        assert equal(MAIL, other) == whole
        assert equal(MAIL, other, with_arguments=False) == bare

    def test_graph_search_backtracks(self):
        one = '1. f("x")\n2. f("x")\n3. g("$1")\n4. h("$2")'
        other = '1. f("x")\n2. f("x")\n3. g("$2")\n4. h("$1")'
        shared = '1. f("x")\n2. f("x")\n3. g("$1")\n4. h("$1")'
        for with_arguments in (True, False):
            assert equal(one, other, with_arguments)
            assert not equal(one, shared, with_arguments)

    def test_references_in_keywords_are_edges(self):
        one = '1. f(x=1)\n2. f(x=2)\n3. g(of=["$1"], at="$2")'
        other = '1. f(x=2)\n2. f(x=1)\n3. g(at="$1", of=["$2"])'
        wrong = '1. f(x=1)\n2. f(x=2)\n3. g(of=["$2"], at="$1")'
        assert equal(one, other)
        assert not equal(one, wrong)
        assert equal(one, wrong, with_arguments=False)
        with pytest.raises(ValueError, match=r"uses \$2, which is not an earlier call"):
            plans.parse("1. f(x='$2')\n2. join()")

    def test_success_of_a_generated_plan(self):
        wrong = MAIL.replace("Lunch", "Dinner") + END
        judge = lambda text: plans.judge(text, plans.Example((), MAIL + END))
        assert judge(MAIL + END) == {"success": 1, "success without arguments": 1}
        assert judge(wrong) == {"success": 0, "success without arguments": 1}
        assert judge("1. find(") == {"success": 0, "success without arguments": 0}


PLAN = "1. weather(city='Berkeley')\n2. weather(city='Nice')" + END
ACCEPTED = (
    {"city": ["Berkeley", "Berkeley, CA"], "unit": ["", "celsius"]},
    {"city": ["Nice"], "days": ["", 3]},
)


class TestAccepted:
    @pytest.mark.parametrize(
        ("value", "accepted", "expected"),
        [
            ("berkeley ca", "Berkeley, CA", True),
            ("2024-04-01", "2024/04/01", True),
            ("a'b", 'a"b', True),
            ("a+b", "ab", False),
            ("1", 1, False),
            (1, "1", False),
            (5, 5.0, True),
            (5.0, 5, True),
            (5.1, 5, False),
            (True, 1, False),
            (0, False, False),
            (True, True, True),
            (None, None, True),
            (None, "", False),
            ([1, "A b"], [1, "ab"], True),
            ((1, 2), [1, 2], True),
            ([2, 1], [1, 2], False),
            ([1, 2, 3], [1, 2], False),
            ("12", ["1", "2"], False),
            ({"a": "X"}, {"a": ["x", "y"], "b": [2, ""]}, True),
            ({"a": "X", "b": 3}, {"a": ["x", "y"], "b": [2, ""]}, False),
            ({"b": 2}, {"a": ["x", "y"], "b": [2, ""]}, False),
            ({"a": "x", "c": 1}, {"a": ["x", "y"]}, False),
            ([{"a": 1}, {"a": 2}], [{"a": [1]}, {"a": [3, 2]}], True),
            ([{"a": 2}, {"a": 1}], [{"a": [1]}, {"a": [3, 2]}], False),
            ([["a"]], {"a": ["a"]}, False),
        ],
    )
    def test_value_matches(self, value, accepted, expected):
        assert plans.matches(value, accepted) == expected

    @pytest.mark.parametrize(
        ("written", "expected"),
        [
            ("1. weather(city='Berkeley')\n2. weather(city='Nice')", True),
            (
                "2. weather(days=3, city='nice')\n7. weather(unit='Celsius', city='berkeley CA')",
                True,
            ),
            ("1. weather(city='Nice')\n2. weather(city='Nice')", False),
            ("1. weather(city='Berkeley', unit='kelvin')\n2. weather(city='Nice')", False),
            ("1. weather(city='Berkeley', days=3)\n2. weather(city='Nice')", False),
            ("1. weather(unit='celsius')\n2. weather(city='Nice')", False),
            ("1. weather('Berkeley')\n2. weather(city='Nice')", False),
            ("1. weather('x', city='Berkeley')\n2. weather(city='Nice')", False),
            ("1. weather(city=Berkeley)\n2. weather(city='Nice')", False),
        ],
    )
    def test_success_needs_accepted_arguments(self, written, expected):
        found = plans.judge(written + END, plans.Example((), PLAN, ACCEPTED))
        assert found == {"success": expected, "success without arguments": 1}

    def test_accepted_reference_to_a_call(self):
        plan = "1. f(x=1)\n2. f(x=2)\n3. g(of='$2')"
        example = plans.Example((), plan + END, ({"x": [1]}, {"x": [2]}, {"of": ["$2", "of $2"]}))
        for of in ("$1", "of ${1}"):
            swapped = f"1. f(x=2)\n2. f(x=1)\n3. g(of='{of}')"
            assert plans.judge(swapped + END, example)["success"] == 1
            assert (
                plans.judge(swapped.replace("1}", "2}").replace("$1", "$2") + END, example)[
                    "success"
                ]
                == 0
            )

    def test_all_plans_of_accepted_values_are_accepted(self):
        values = ["Berkeley", "Berkeley, CA"], [None, "celsius"], [None, 3]
        count = 0
        for city, unit, days in itertools.product(*values):
            first = {"city": city} | ({} if unit is None else {"unit": unit})
            second = {"city": "Nice"} | ({} if days is None else {"days": days})
            for calls in ([first, second], [second, first]):
                written = plans.text_of([("weather", keywords) for keywords in calls])
                count += plans.judge(written, plans.Example((), PLAN, ACCEPTED))["success"]
        assert count == 16

    def test_record_of_a_line(self):
        messages = [{"role": "user", "content": "Weather?"}]
        line = {"messages": messages, "plan": PLAN}
        assert plans.example(line) == ((("user", "Weather?"),), PLAN, None)
        found = plans.example(line | {"accepted": list(ACCEPTED), "id": 3})
        assert found == ((("user", "Weather?"),), PLAN, ACCEPTED)
        assert [call.accepted for call in plans.expected(found)] == list(ACCEPTED)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"plan": "no"}, "'no' is not a call"),
            ({"messages": [1]}, "malformed record: 'int' object"),
            ({"messages": 1}, "malformed record: 'int' object"),
            ({"accepted": []}, "accepted arguments of 0 calls, not 2"),
            (
                {"accepted": [{"city": ["Nice"]}] * 2},
                "call 1 of the plan is not among the accepted",
            ),
            ({"accepted": [{"city": 1}] * 2}, "malformed record: 'int' object is not iterable"),
        ],
        ids=range(6),
    )
    def test_malformed_line_is_refused(self, change, message):
        line = {"messages": [], "plan": PLAN, "accepted": list(ACCEPTED)}
        with pytest.raises(ValueError, match=r".") as error:
            plans.example(line | change)
        assert message in str(error.value)


def test_split_shares_no_called_function():
    calls = [f"f{i % 40}" for i in range(100)]
    texts = [plans.text_of([(name, {"x": i})]) for i, name in enumerate(calls)]
    texts += [plans.text_of([(f"f{i}", {}), (f"f{i + 1}", {})]) for i in range(0, 40, 2)]
    examples = [plans.Example((), text) for text in texts]
    rest, held_out = plans.split(examples, 0.2, seed=3)
    assert sorted(rest + held_out) == sorted(examples)
    names = lambda part: {call.name for example in part for call in plans.parse(example.plan)}
    assert not names(rest) & names(held_out)
    assert len(names(held_out)) % 2 == 0  # pairs stay together
    assert 24 <= len(held_out) < 24 + 7  # a group has at most seven
    assert (rest, held_out) == plans.split(examples, 0.2, seed=3)
    assert held_out != plans.split(examples, 0.2, seed=4)[1]
    number = [int(plans.parse(e.plan)[0].name[1:]) for e in rest]
    assert number != sorted(number, key=number.index)  # groups are not together
    assert plans.split([plans.Example((), "1. join()")], 0.0) == ([((), "1. join()", None)], [])
