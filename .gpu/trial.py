import sys, time, statistics as st, threading, torch, torch.distributed as dist
sys.path.insert(0,'src')
from datetime import timedelta
from hcms.links import ghost
from hcms.links.ghost import WIRE
from hcms.attention import SequenceParallelAttention as A
import pynvml; pynvml.nvmlInit(); nv=pynvml.nvmlDeviceGetHandleByIndex(0)
dev=torch.device('cuda',0); torch.cuda.set_device(dev)
print(torch.cuda.get_device_name(0), torch.__version__)
N,H=40,128
def full_ref(q,k,v,P):
    from hcms.kernels import attend_full
    B,L,_,_=q.shape; M=N//P
    w=[x.view(B,L,P,M,H).permute(0,2,1,3,4).reshape(B,P*L,M,H) for x in (q,k,v)]
    rows=torch.linspace(0,P*L-1,48,device=dev).long()
    o=attend_full(w[0][:,rows],w[1],w[2])
    return rows,o
def gather_rows(out,rows,P):
    B,L,_,_=out.shape; M=N//P
    return out.view(B,L,P,M,H).permute(0,2,1,3,4).reshape(B,P*L,M,H)[:,rows]
def load(call,secs):
    for _ in range(2): WIRE.replay(); call()
    torch.cuda.synchronize()
    evs=[]; t0=time.perf_counter(); host=[]
    while time.perf_counter()-t0<secs:
        a,b=torch.cuda.Event(enable_timing=True),torch.cuda.Event(enable_timing=True)
        WIRE.replay(); a.record(); h=time.perf_counter(); call(); host.append((time.perf_counter()-h)*1e3); b.record(); evs.append((a,b))
        if len(evs)>=2: evs[-2][1].synchronize()
    torch.cuda.synchronize()
    clk=pynvml.nvmlDeviceGetClockInfo(nv,pynvml.NVML_CLOCK_SM); 
    ts=[a.elapsed_time(b) for a,b in evs]
    return st.median(ts[len(ts)//2:]), st.median(host), clk
world=None
for P,S,cuts in ((4,57600,['1-2-3-3-1','1x2-2-3-3-1x2','1x2-2-3-3-1x2+fill']),(4,32400,['1-2-3-3-1','1x2-2-3-3-1x2','1-2-3-3-1+fill','1x2-2-3-3-1x2+fill']),(8,57600,['1-1-1-1-1','1x2-1-1-1-1x2','1x2-1-1-1-1x2+fill','1x4-1-1-1-1x4+fill'])):
    if dist.is_initialized(): dist.destroy_process_group()
    ghost.start(0,P,dev,timedelta(minutes=1))
    L=S//P
    ins=[[torch.randn(1,L,N,H,device=dev).bfloat16() for _ in range(3)] for _ in range(2)]
    WIRE.reserve(max(4,2*(P-1))*ins[0][0].nbytes+(1<<20))
    cases=[('ulysses','-','auto'),('ulysses-packed','-','auto'),('hcms','1-3-3-3' if P==4 else 'even:5','auto'),('hcms','1-3-3-3' if P==4 else 'even:5','off'),('ring','-','auto')]+[('hcms-zero',c,'auto') for c in cuts]+[('hcms-zero',cuts[-1],'off')]
    objs={}
    ref=None
    with torch.inference_mode():
        for m,c,g in cases:
            try:
                a=A(None,m,c if c!='-' else 'even:1','sdpa',graph=g); 
                for which in (0,1):
                    x=ins[which]
                    gsave,a.graph=a.graph,'off'
                    WIRE.prepare(N); o1=a(*x); torch.cuda.synchronize()
                    WIRE.replay(); WIRE.spoil(); a.poison(); o2=a(*x); w=WIRE.wrong_bytes()
                    a.graph=gsave
                    a.poison() 
                    for _ in range(3): WIRE.replay(); o3=a(*x)
                    WIRE.spoil(); a.poison(); WIRE.replay(); o3=a(*x); w3=WIRE.wrong_bytes()
                    if (m,which)==('ulysses',0): ref=o1.clone()
                    if which==0:
                        rows,o=full_ref(*x,P); err=(gather_rows(o3,rows,P).double()-o).abs().max().item()
                        print(m,c,g,'prep==replay',torch.equal(o1,o2),'graph',torch.equal(o1,o3),a.path,'wrong',w,w3,'bitwise ulysses',torch.equal(o3,ref),'err',f'{err:.2e}',flush=True)
                objs[(m,c,g)]=a
            except Exception as e:
                print(m,c,g,'FAILED',type(e).__name__,str(e)[:300],flush=True)
                import traceback; traceback.print_exc()
        x=ins[0]; M=N//P
        full=[torch.randn(1,S,M,H,device=dev).bfloat16() for _ in range(3)]
        kern=objs[('ulysses','-','auto')].kernel
        res={}
        for rnd in range(3):
            for k,a in [('ceiling',None),*objs.items()]:
                if a is None: r=load(lambda: kern.attend(*full),0.35)
                else:
                    gsave,a.graph=a.graph,'off'; WIRE.prepare(N); a(*x); torch.cuda.synchronize(); a.graph=gsave
                    WIRE.replay(); r=load(lambda: a(*x),0.35)
                res.setdefault(k,[]).append(r)
        c=st.median(r[0] for r in res['ceiling']); p=st.median(r[0] for r in res[('ulysses-packed','-','auto')])
        print(f'P={P} S={S} rho_packed {(p-c)/p:.3f}')
        for k,r in res.items():
            ms=st.median(y[0] for y in r); print(f'  {k!s:50s} {ms:7.2f} ms host {st.median(y[1] for y in r):5.2f} {r[-1][2]} MHz x{p/ms:.3f} hidden {(p-ms)/(p-c):.2f}  {[round(y[0],2) for y in r]}',flush=True)
    del objs, ins, full; torch.cuda.empty_cache()
