"""The OpenAPI document: valid, and true of a director that runs, whatever is asked of it."""

import pytest
import schemathesis
from fieldlab_common.protocol import ENDPOINTS
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.specs.openapi.definitions import OPENAPI_31_VALIDATOR

EXAMPLES = 3  # of each endpoint, the same each time


@pytest.fixture(scope="module")
def root(lab):
    return lab.user("root", "admin")


@pytest.fixture(scope="module")
def api(root):
    return schemathesis.openapi.from_dict(root.get("/openapi.json").json())


def test_the_document_is_valid(root):
    document = root.get("/openapi.json").json()
    assert [error.message for error in OPENAPI_31_VALIDATOR.iter_errors(document)] == []


@pytest.mark.parametrize("name", ENDPOINTS)
def test_what_a_director_answers_is_what_the_document_says(lab, root, api, name):
    row = ENDPOINTS[name]
    operation = api[row.path][row.method]

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def ask(case):
        case.call_and_validate(base_url=lab.url, headers={"Authorization": root.headers["authorization"]})

    ask()
