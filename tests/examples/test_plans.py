"""TinyAgent's plans: parser, comparison as graphs, success."""

import pytest

from examples.finetuning import tinyagent


END = "\n9. join()<END_OF_PLAN>"
MAIL = '1. find("Sid")\n2. find("Lu")\n3. mail(["$1", "$2"], "Lunch", 12)'


def equal(one: str, other: str, with_arguments: bool = True) -> bool:
    pair = tinyagent.parse(one + END), tinyagent.parse(other + END)
    answers = {tinyagent.same_graph(*p, with_arguments=with_arguments) for p in (pair, pair[::-1])}
    (answer,) = answers  # whichever comes first
    return answer


class TestPlans:
    def test_parsed_plan_is_its_calls(self):
        assert tinyagent.parse(MAIL + END) == [
            (1, "find", ["Sid"]),
            (2, "find", ["Lu"]),
            (3, "mail", [["$1", "$2"], "Lunch", 12]),
        ]
        assert tinyagent.parse("1. now()\n2. say(${1}, x)\n3. join()\n4. no call") == [
            (1, "now", []),
            (2, "say", "${1}, x"),  # no Python: as it is written
        ]

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
            tinyagent.parse(text)
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
        ],
        ids=range(9),
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

    def test_success_of_a_generated_plan(self):
        wrong = MAIL.replace("Lunch", "Dinner") + END
        assert tinyagent.judge(MAIL + END, MAIL + END) == {
            "success": 1,
            "success without arguments": 1,
        }
        assert tinyagent.judge(wrong, MAIL + END) == {"success": 0, "success without arguments": 1}
        assert tinyagent.judge("1. find(", MAIL + END) == {
            "success": 0,
            "success without arguments": 0,
        }
