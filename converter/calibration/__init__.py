"""The calibrated pass: the text, the streamed model, what is learned on the way."""
