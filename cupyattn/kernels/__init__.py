"""Launchers: a plan and this call's addresses become one launch. They decide nothing."""
