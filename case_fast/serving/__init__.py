"""Answering raw texts with a trained run; `serving.chat` talks in a terminal."""

from case_fast.serving.responder import Reply, Responder, load

__all__ = ["Reply", "Responder", "load"]
