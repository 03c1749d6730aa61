"""Calibration: prompts through the reference model, observers of every module's input."""

from ringexport.calibrate.prompts import PromptSet, load_prompts, shipped_prompts
from ringexport.calibrate.run import CalibrationSettings, calibrate

__all__ = ["CalibrationSettings", "PromptSet", "calibrate", "load_prompts", "shipped_prompts"]
