"""Measuring models: loss, text, generated answers, and one model beside another."""
