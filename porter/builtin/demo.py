"""What `porter demo` shows: the embedded model, its prompts, and the fault that is planted."""

MODEL = "builtin:tiny-flux"
PROMPT = "a large red circle on the left and a small blue square on the right, on a yellow background"
SEED = 7
# A contact sheet of captions: one object, two objects, both orders of naming them.
CAPTIONS = (
    "a small orange triangle in the top right corner, on a blue background",
    "a white background with a large purple cross in the center",
    "a large green circle at the bottom, on a black background",
    "a small black square on the left, on an orange background",
    "a small red triangle left of a large white circle, on a green background",
    "a large white circle left of a small red triangle, on a green background",
    "a purple background with a small yellow cross above a large blue square",
    "a large black triangle on the right and a small green cross on the left, on a white background",
)
FAULT = "scale and shift of the last layer not swapped"
BROKEN_RECIPE = '''\
"""FLUX.1's recipe with one fault planted: the last layer's shift and scale are not swapped."""

from conversions.flux1.recipe import TRANSFORMER

BROKEN = TRANSFORMER.replace_rule("final_layer.adaLN_modulation.1.{p:weight|bias}", ops=())
RECIPES = {"transformer": BROKEN}
'''
