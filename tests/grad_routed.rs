//! Gradients of several losses, each for its own variables: SER at several layers with blocks kept
//! apart.

mod loss_common;
mod ser_common;

use candle_core::{DType, Device, Result, Tensor, Var, backprop::GradStore};
use candle_nn::{VarBuilder, VarMap};
use loss_common::{assert_close, assert_says, flat, rng, scalar, tokens};
use ser_common::{nt_xent_at, reseed, small_head, turns, with_objective};
use ser_reg::grad::{self, named};
use ser_reg::{MapPair, Projector, SerConfig, SerLoss, tap};

type Done = ser_reg::Result<()>;

const WIDTH: usize = 4;
const LAYERS: [&str; 3] = ["block0", "block1", "block2"];

/// Three blocks, each tapped, and a linear readout.
struct Net(VarMap);

impl Net {
    fn new() -> Result<Self> {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
        for name in ["block0", "block1", "block2", "head"] {
            vb.get((WIDTH, WIDTH), &format!("{name}.w"))?;
        }
        reseed(&vars, 2);
        Ok(Self(vars))
    }

    fn var(&self, name: &str) -> Var {
        self.0.data().lock().unwrap()[name].clone()
    }

    /// With `cut` each block starts from a copy of the tapped map without its graph: the reference
    /// for `routed`.
    fn forward(&self, x: &Tensor, cut: bool) -> Result<Tensor> {
        let mut x = x.clone();
        for block in LAYERS {
            x = (x.broadcast_matmul(&self.var(&format!("{block}.w")))?.tanh()? + &x)?;
            tap::record(block, &x)?;
            if cut {
                x = x.detach();
            }
        }
        x.broadcast_matmul(&self.var("head.w"))?.sqr()?.mean_all()
    }

    fn capture(&self, x: &Tensor, cut: bool) -> Result<(Tensor, Vec<Tensor>)> {
        tap::capture_all(&LAYERS, || self.forward(x, cut))
    }
}

/// A loss with a head per layer; later layers count half.
struct Layers {
    ser: SerLoss,
    heads: Vec<Projector>,
    vars: VarMap,
}

impl Layers {
    fn new() -> ser_reg::Result<Self> {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
        let head = |name: &&str| Projector::new(WIDTH, small_head(), vb.pp(format!("ser.{name}")));
        let heads = LAYERS.iter().map(head).collect::<ser_reg::Result<_>>()?;
        reseed(&vars, 1);
        let ser = SerLoss::new(SerConfig { lambda: 0.7, ..with_objective(nt_xent_at(0.5)) })?;
        Ok(Self { ser, heads, vars })
    }

    fn losses(&self, maps1: &[Tensor], maps2: &[Tensor]) -> ser_reg::Result<Vec<Tensor>> {
        let relative = turns();
        let loss = |i: usize| {
            let pair = MapPair::new([&maps1[i], &maps2[i]], &relative).head(&self.heads[i]);
            Ok((self.ser.forward(&pair)?.loss * 0.5f64.powi(i as i32))?)
        };
        (0..LAYERS.len()).map(loss).collect()
    }
}

/// The gradients at all variables, by name.
fn by_name(grads: &GradStore, vars: &[(String, Var)]) -> Vec<(String, Option<Vec<f64>>)> {
    let at = |(name, var): &(String, Var)| (name.clone(), grads.get(var).map(flat));
    vars.iter().map(at).collect()
}

#[test]
fn routed_gradients_are_those_of_a_model_cut_at_its_taps() -> Done {
    let (net, layers) = (Net::new()?, Layers::new()?);
    let mut all = named(&net.0, "");
    all.extend(named(&layers.vars, ""));
    let x1 = tokens(&mut rng(8), (3, 9, WIDTH), DType::F64)?;
    let x2 = tokens(&mut rng(9), (3, 9, WIDTH), DType::F64)?;

    let (base, maps1) = net.capture(&x1, false)?;
    let (_, maps2) = net.capture(&x2, false)?;
    let losses = layers.losses(&maps1, &maps2)?;
    let own = |name: &str| -> Vec<Var> {
        let head = named(&layers.vars, &format!("ser.{name}"));
        let vars = [named(&net.0, name), head].concat();
        vars.into_iter().map(|(_, var)| var).collect()
    };
    let vars: Vec<Vec<Var>> = LAYERS.into_iter().map(own).collect();

    // The equivariance losses alone: as if every block had started from a map without a graph.
    let parts = losses.iter().zip(vars.iter().map(Vec::as_slice));
    let mut parts: Vec<_> = parts.collect();
    let routed = grad::routed(&parts)?;
    let sum = |losses: &[Tensor]| -> Result<Tensor> { (&losses[0] + &losses[1])? + &losses[2] };
    let (_, cut1) = net.capture(&x1, true)?;
    let (_, cut2) = net.capture(&x2, true)?;
    let cut = sum(&layers.losses(&cut1, &cut2)?)?.backward()?;
    for ((name, routed), (_, cut)) in by_name(&routed, &all).iter().zip(by_name(&cut, &all)) {
        match (routed, cut) {
            (Some(routed), Some(cut)) => {
                assert_close(routed, &cut, 1e-14);
                assert!(routed.iter().any(|g| g.abs() > 1e-6), "{name}");
            }
            (routed, cut) => {
                assert!(routed.is_none() && cut.is_none(), "{name}");
                assert_eq!(name, "head.w");
            }
        }
    }
    // It is another gradient than the plain sum gives, at every block but the last.
    let plain = sum(&losses)?.backward()?;
    for (name, differs) in [("block0.w", true), ("block1.w", true), ("block2.w", false)] {
        let var = net.var(name);
        let [a, b] = [&plain, &routed].map(|g| flat(g.get(&var).expect("a gradient")));
        let gaps = a.iter().zip(b).map(|(a, b)| (a - b).abs());
        let gap = gaps.fold(0.0, f64::max);
        assert_eq!(gap > 1e-4, differs, "{name}: {gap}");
    }

    // With the base loss, which still trains every block of the net and nothing of the heads.
    let net_vars = net.0.all_vars();
    parts.push((&base, &net_vars));
    let both = grad::routed(&parts)?;
    let alone = base.backward()?;
    for (name, var) in &all {
        let at = |g: &GradStore| g.get(var).map(flat).unwrap_or(vec![0.0; var.elem_count()]);
        let sums = at(&routed).into_iter().zip(at(&alone));
        let sums: Vec<f64> = sums.map(|(a, b)| a + b).collect();
        assert_close(&at(&both), &sums, 1e-14);
        assert!(both.get(var).is_some(), "{name}");
    }
    Ok(())
}

#[test]
fn routed_keeps_nothing_of_other_variables() -> Done {
    let var = |v: f64| Var::new(v, &Device::Cpu).unwrap();
    let (a, b) = (var(3.0), var(5.0));
    let loss = (a.as_tensor() * b.as_tensor())?;
    // A name listed twice counts once.
    let grads = grad::routed(&[(&loss, &[&a, &a][..])])?;
    assert_eq!(grads.get(&a).map(scalar), Some(5.0));
    assert!(grads.get(&b).is_none() && grads.get(&loss).is_none());
    assert_eq!(grads.get_ids().count(), 1);
    // A loss without variables is left out.
    let grads = grad::routed(&[(&loss, &[][..]), (&loss, &[&b][..])])?;
    assert_eq!(grads.get(&b).map(scalar), Some(3.0));
    // The gradients hold no graph.
    assert!(!grads.get(&b).expect("a gradient").track_op());

    let none: [(&Tensor, &[&Var]); 0] = [];
    assert_says(grad::routed(&none), &["at least one loss", "0 losses"]);
    assert_says(grad::routed::<&Var>(&[(&loss, &[])]), &["1 losses, none"]);
    let wide = a.broadcast_as(3)?;
    assert_says(grad::routed(&[(&wide, &[&a])]), &["grad::routed", "scalar"]);
    Ok(())
}
