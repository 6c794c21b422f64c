"""Triton's interpreter in half of the time."""


def patch_once_per_launch() -> None:
    """Let the interpreter patch `triton.language` once per launch and module.

    By itself it does so at every call of a device function, which takes half of its time. Of these
    patches only those of the kernel's own module are undone, at the end of the launch.
    """
    from triton.runtime import interpreter

    launch, patched = interpreter.GridExecutor.__call__, set()

    def run(executor, *args, **kwargs):
        patched.clear()
        return launch(executor, *args, **kwargs)

    def call(function, *args, **kwargs):
        module = function.fn.__globals__
        if id(module) not in patched:
            interpreter._patch_lang(function.fn)
            patched.add(id(module))
        return function.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = run
    interpreter.InterpretedFunction.__call__ = call
