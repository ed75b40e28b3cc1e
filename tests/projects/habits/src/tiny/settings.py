"""The hooks of the habits."""

from tiny.hooks_of_habits import Habits

HOOKS = (Habits(),)
