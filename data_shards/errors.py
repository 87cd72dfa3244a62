"""What a user can mend: one line that says where, what was found, what is right and what to type."""


class UserError(Exception):
    """An error whose message is enough for the user; the program prints that line alone and leaves with `exit_code`."""

    exit_code = 2
    passing = False  # nobody did anything wrong: asking again later may help
