# What the samples of the docs use of Pyramid, which publishes no types.
from pyramid import testing as testing
