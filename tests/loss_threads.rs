//! The loss does not depend on the number of threads, in any bit.

mod loss_common;

use std::process::Command;

use candle_core::DType;
use loss_common::{rng, tokens};
use ser_reg::loss::{Contrastive, nt_xent, nt_xent_symmetric};

const CHILD: &str = "SER_REG_PRINT_BITS";

/// The bits of the losses and of their gradients, on as many threads as the environment says.
fn bits() -> ser_reg::Result<String> {
    let rng = &mut rng(1);
    let (z, zp) = (tokens(rng, (5, 67, 48), DType::F32)?, tokens(rng, (5, 67, 48), DType::F32)?);
    let config = Contrastive { block_bytes: 100_000, temperature: 0.1, ..Default::default() };
    let mut bits = Vec::new();
    for run in [nt_xent, nt_xent_symmetric] {
        let loss = run(&z, &zp, &config)?.loss;
        let grads = loss.backward()?;
        bits.push(loss.to_scalar::<f32>()?.to_bits());
        for v in [&z, &zp] {
            let grad = grads.get(v).expect("a gradient").flatten_all()?;
            bits.extend(grad.to_vec1::<f32>()?.into_iter().map(f32::to_bits));
        }
    }
    Ok(format!("bits {bits:?}"))
}

#[test]
fn the_number_of_threads_does_not_change_a_bit() -> ser_reg::Result<()> {
    if std::env::var_os(CHILD).is_some() {
        println!("threads {}", rayon::current_num_threads());
        println!("{}", bits()?);
        return Ok(());
    }
    // The pools of rayon and of candle's products are sized once per process: each count needs
    // another process.
    let on = |threads: &str| {
        let test = std::env::current_exe().expect("the path of this test");
        let out = Command::new(test)
            .args(["--exact", "the_number_of_threads_does_not_change_a_bit", "--nocapture"])
            .env(CHILD, "1")
            .env("RAYON_NUM_THREADS", threads)
            .output()
            .expect("a child process");
        let out = String::from_utf8(out.stdout).expect("text");
        assert!(out.contains(&format!("threads {threads}\n")), "{out}");
        let line = out.lines().find(|l| l.starts_with("bits")).expect("the child's bits");
        line.to_string()
    };
    let single = on("1");
    for threads in ["2", "3", "7"] {
        assert!(on(threads) == single, "{threads} threads differ from one");
    }
    Ok(())
}
