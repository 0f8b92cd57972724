"Measurements of this project, side by side with what they are compared with: `python -m benchmarks [NAME ...]`."
