"""Answers of many adapters in one forward pass.

answerer            the constituent models, loaded: greedy answers, probabilities, and how they combine
stacked_adapters    the adapters of all requests in one forward
generation          prefill and decoding of a batch that starts together
continuous          requests that join and leave while others run, in the `slots` of one batch
sampling            how a token is drawn
answer_text         the text of a growing answer, up to a stop text
hf_model            the same models as a `PreTrainedModel`
base_trial          whether a base can be trained and asked, tried before the first training
"""
