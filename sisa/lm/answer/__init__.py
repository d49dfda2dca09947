"""Answers of many adapters in one forward pass.

answerer            the constituent models, loaded: probabilities, and how they combine
stacked_adapters    the adapters of all requests in one forward
generation          prefill; greedy answers of a batch that starts together (`Model.generate`)
continuous          a service's answers: requests that join and leave, in the `slots` of one batch
sampling            how `continuous` draws a token
answer_text         the text of an answer of `continuous`, up to a stop text
hf_model            the same models as a `PreTrainedModel`
base_trial          whether a base can be trained and asked, tried before the first training
"""
