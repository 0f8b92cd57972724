"The errors that are written for people: one sentence with the value, the rule and the remedy."


class UserError(Exception):
    "Something failed for a reason that a user can act on; its text is complete without a traceback."


class UsageError(UserError):
    "What was asked for cannot be done as asked: refused before anything starts."
