"""Answering raw texts with a trained run, and talking to it in a terminal."""

from case_fast.serving.chat import chat
from case_fast.serving.responder import Reply, Responder, load

__all__ = ["Reply", "Responder", "chat", "load"]
