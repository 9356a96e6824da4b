"""Run folders in, tables and figures out; never imports jax."""

from agwm_jax.report.write import Report as Report
from agwm_jax.report.write import write_report as write_report
