"""From the commands that netunicorn's tasks require to what environments are made of."""

import pytest
from fieldlab.contrib.netunicorn.requirements import requirements_of
from fieldlab_common.environment import Requirements


def test_requirements_become_packages_system_packages_and_setup():
    commands = [
        "sudo apt-get update",
        "sudo apt-get install -y tcpdump procps",
        "pip install 'numpy>=2' pandas",
        "python3 -m pip install -U requests",
        "mkdir -p /tmp/data",
    ]
    assert requirements_of(commands) == Requirements(
        packages=("numpy>=2", "pandas", "requests"),
        system_packages=("tcpdump", "procps"),
        setup=("mkdir -p /tmp/data",),
    )


@pytest.mark.parametrize(
    "command",
    [
        "pip install -r requirements.txt",
        "pip install . ",
        "apt-get install -y a=1.2",
        "pip install x && touch y",
        "curl https://example.org | sh",
        "pip install 'open",
    ],
)
def test_a_command_that_is_more_than_an_install_of_names_stays_a_command(command):
    assert requirements_of([command]).setup == (command.strip(),)


def test_an_update_stays_where_a_command_needs_it():
    commands = ("apt-get update", "apt-get install -y a=1.2")
    assert requirements_of(commands).setup == commands
