"""The valley: an invented world with a known truth, so that the whole recipe runs and is judged offline."""

from puna.valley.ledger import World

__all__ = ["World"]
