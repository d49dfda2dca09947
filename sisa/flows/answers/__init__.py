"""Answers of the model: who answers a prompt, what is loaded for it, and how probable answers are.

ask          prompts, their routes and their tokens; answers       routing      the shards of a prompt
serving      the models that are served now, loaded and kept so    probability  of held records' answers
"""
