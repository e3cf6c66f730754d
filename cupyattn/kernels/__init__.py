"""Launchers: a plan and this call's addresses become one launch. They decide nothing."""

from .launch import Prepared, PreparedAppend, describe_device, prepare, prepare_append

__all__ = ["Prepared", "PreparedAppend", "describe_device", "prepare", "prepare_append"]
