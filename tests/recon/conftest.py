"""What the tests of this folder share."""

import pytest

from recon.cli import main


@pytest.fixture
def recon(capsys):
    """Run the command; gives its exit status, standard output and standard error."""

    def run(*arguments):
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return exit_.value.code, printed.out, printed.err

    return run
