//! Barlow Twins (arXiv 2103.03230) with soft equivariance regularization, on 8,000 images, in minutes on two CPU cores.
//!
//! The command lines are those of `moco_v3`, with `--example barlow_twins`. Lines marked `SER` are what the regularizer adds.
//!
//! The small preset changes this: the projector is 256 wide instead of 8,192, since a batch of 64 images tells nothing about
//! more correlations. The redundancy term weighs 0.02 instead of 0.0051, because it has fewer summands. The loss is scaled by
//! 10/256 for 256 dimensions. AdamW replaces LARS, as in the paper of SER. There is one encoder: it also makes the keys of
//! the regularizer, with a gradient. `--preset imagenet-vit-s16 --data FOLDER` has the paper's values.

use anyhow::Result;
use candle_core::Tensor;
use clap::Parser;
use ser_reg_trainers::{
    cli::Args,
    environment,
    method::{Head, barlow},
    run::{Losses, Run, Term, checkpoint::State},
    settings::Method,
    views::{Images, colored, join},
    vit::Vit,
    weights::Weights,
};

fn main() -> Result<()> {
    environment::prepare();
    // A worker of the pool trains, so that no operation has to wake the pool from outside.
    rayon::scope(|_| train())
}

fn train() -> Result<()> {
    let mut run = Run::open(Method::BarlowTwins, &Args::parse())?;
    let settings = run.settings.clone();
    let base = settings.base.barlow_twins()?;

    let online = Weights::seeded(settings.seed);
    let vb = online.builder(&run.device);
    let encoder = Vit::new(&run.vit, vb.pp("encoder"))?;
    let project = Head::new(&base.projector, vb.pp("projector"))?;
    let mut ser = settings.ser.regularizer(&run.vit, vb.pp("ser"))?; // SER: views, tap, head, loss

    let mut state = State::new(&online, None)?;
    run.begin(&encoder, &mut ser, &mut state)?;
    while let Some(batch) = run.next_batch()? {
        let training = encoder.training(batch.drop_path());
        let model = |x: &Tensor| training.forward(x);

        // SER draws two views of each of its images. The encoder records block `--layer`, where the maps are compared.
        let rng = &mut batch.rng(); // SER
        let (term, shared) = match &batch.ser {
            None => (None, None),
            Some(Images::Own(own)) => {
                let out = ser.forward(own, rng, model)?; // SER
                (Some(Term::from(out)), None)
            }
            // The paper's form: the features of the views also enter the base loss.
            Some(Images::Shared(images)) => {
                let out = ser.forward_with_outputs(images, rng, colored(model))?; // SER
                let (term, shared, _) = Term::and_outputs(out);
                (term, shared)
            }
        };

        // Each view has its own batch statistics in the projector.
        let [z1, z2] = join(batch.encode(model)?, shared)?.map(|x| project.forward(&x));
        let loss = barlow::loss(&z1?, &z2?, base.redundancy, base.scale)?;
        let losses = Losses::new(loss, term); // SER: the term is added to the base loss
        run.step(&batch, losses, &encoder, &mut ser, &mut state)?;
    }
    run.finish(&encoder, &state)
}
