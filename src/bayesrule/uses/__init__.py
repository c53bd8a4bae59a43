"""What a posterior is for: prediction, metrics, calibration, sensitivity, merging."""
