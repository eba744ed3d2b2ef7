"""Answering raw texts with a trained run and saying why; `serving.chat` talks in a terminal."""

from case_fast.serving.edits import EditError
from case_fast.serving.reasons import Explanation, Reply
from case_fast.serving.responder import Asked, Responder, load

__all__ = ["Asked", "EditError", "Explanation", "Reply", "Responder", "load"]
