"""Run folders in, tables and figures out; never imports jax."""

from agwm_jax.report.study import write_study_report as write_study_report
from agwm_jax.report.write import Report as Report
from agwm_jax.report.write import write_report as write_report
