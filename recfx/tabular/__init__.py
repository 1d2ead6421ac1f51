"""A program for a user's own files: columns from their schema, a model by name, scores and importance."""

from recfx.tabular.columns import Role, Roles, roles_of
from recfx.tabular.importance import importance
from recfx.tabular.models import MODELS
from recfx.tabular.program_text import program_text
from recfx.tabular.scoring import score

__all__ = ["MODELS", "Role", "Roles", "importance", "program_text", "roles_of", "score"]
