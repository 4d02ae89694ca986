"""Answers from a serving engine: any server with the OpenAI completions interface, running or started for it."""

from dft_lightning.engine.abilities import Abilities
from dft_lightning.engine.answers import Answer
from dft_lightning.engine.client import EngineClient, Question
from dft_lightning.engine.options import EngineOptions
from dft_lightning.engine.server import Server

__all__ = ["Abilities", "Answer", "EngineClient", "EngineOptions", "Question", "Server"]
