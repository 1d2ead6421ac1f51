"""t"""
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from recfx.capture import sections_function
from recfx.examples import deepfm as program
from recfx.types import Ragged, pack
from graphs.fake_cuda import compiling
import re
def text():
    B=1000
    def ragged(dtype):
        return Ragged(torch.zeros(B,dtype=dtype), torch.arange(B+1,dtype=torch.int32))
    cols={"label": torch.zeros(B,1)}
    cols |= {n: ragged(torch.float32) for n in program.NUMERIC}
    cols |= {n: ragged(torch.int64) for n in program.CATEGORICAL}
    batch=pack(cols)
    real=batch.sections
    args=program.parse(["--gradient_accumulation_steps","1","--numeric","raw","--device","cuda","--max_rows",str(100_000)])
    with FakeTensorMode(), torch.no_grad():
        step,state=program.build_step(args)
        sections=[torch.empty_strided(t.shape,t.stride(),dtype=t.dtype,device='cuda') for t in real]
        code, graph = compiling(sections_function(step.in_graph_, batch.layout), state, sections)
    open('/tmp/dn/code.py','w').write(code)
    out=''
    for line in code[code.index("def call("):].splitlines():
        line=line.strip()
        if m:=re.search(r"(triton_\w+?)\.run\(|extern_kernels\.(\w+)\(|torch\.ops\.(recfx\.\w+|aten\.\w+)", line): out+='  '+line[:150]+'\n'
    return out
