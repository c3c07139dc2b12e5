//! DINO (arXiv 2104.14294) with soft equivariance regularization, on 8,000 images, in minutes on two CPU cores.
//!
//! The command lines are those of `moco_v3`, with `--example dino`. Lines marked `SER` are what the regularizer adds.
//!
//! As in the paper, the teacher is the encoder: it is measured, and `encoder.safetensors` holds it. `student.safetensors` holds
//! the student. `result.json` and the header of each file name the network.
//!
//! The small preset changes this: the head has batch normalization, without which it learned nothing in a thousand steps. It
//! is 256 wide and has 256 prototypes for ten classes, of length 1 and never frozen. The teacher's temperature and the
//! weight decay are constant, the momentum starts at 0.97, and gradients are clipped at 1. There are no local crops, as in
//! the paper of SER. `--preset imagenet-vit-s16 --data FOLDER` has the paper's values.

use anyhow::Result;
use candle_core::{DType, Tensor, Var};
use clap::Parser;
use ser_reg::{Projector, Schedule};
use ser_reg_trainers::{
    cli::Args,
    environment,
    method::dino::{self, DinoHead, Entropies},
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
    let mut run = Run::open(Method::Dino, &Args::parse())?;
    let settings = run.settings.clone();
    let base = settings.base.dino()?;

    // A student, and a teacher that is its moving average.
    let online = Weights::seeded(settings.seed);
    let vb = online.builder(&run.device);
    let encoder = Vit::new(&run.vit, vb.pp("encoder"))?;
    let head = |vb| DinoHead::new(&base.mlp, base.prototypes, base.learned_lengths, vb);
    let student = head(vb.pp("head"))?;
    let mut ser = settings.ser.regularizer(&run.vit, vb.pp("ser"))?; // SER: views, tap, head, loss

    let momentum = online.momentum_copy();
    let vb = momentum.builder(&run.device);
    let key_encoder = Vit::new(&run.vit, vb.pp("encoder"))?;
    let teacher = head(vb.pp("head"))?;
    let key_head = Projector::new(run.vit.dim, settings.ser.head, vb.pp("ser"))?; // SER

    let center = Var::zeros((1, base.prototypes), DType::F32, &run.device)?;
    let frozen = run.fraction(base.freeze_prototypes);
    let (cool, warm) = base.teacher_temperature;
    let sharpness = Schedule::linear(cool, warm, run.fraction(base.teacher_warm_up).max(1))?;
    let mut state = State::new(&online, Some(&momentum))?;
    state.buffers.push(("center", center.clone()));
    // The teacher is what the run measures and saves.
    run.begin(&key_encoder, &mut ser, &mut state)?;
    while let Some(batch) = run.next_batch()? {
        let training = encoder.training(batch.drop_path());
        let model = |x: &Tensor| training.forward(x);
        let keys = |x: &Tensor| key_encoder.forward(x);

        // SER draws two views of each of its images. Both encoders record block `--layer`, where the maps are compared.
        let rng = &mut batch.rng(); // SER
        let (term, shared, key_shared) = match &batch.ser {
            None => (None, None, None),
            Some(Images::Own(own)) => {
                let out = ser.forward_with_keys(own, rng, model, keys, &key_head)?; // SER
                (Some(Term::from(out)), None, None)
            }
            // The paper's form: the features of the views also enter the base loss.
            Some(Images::Shared(images)) => {
                let (model, keys) = (colored(model), colored(keys));
                let out = ser.forward_with_outputs_and_keys(images, rng, model, keys, &key_head)?; // SER
                Term::and_outputs(out)
            }
        };

        // Each view has its own batch statistics in the heads.
        let [s1, s2] = join(batch.encode(model)?, shared)?.map(|x| student.forward(&x));
        let [t1, t2] = join(batch.encode(keys)?, key_shared)?.map(|x| teacher.forward(&x));
        let scores = [t1?, t2?];
        let target = |scores| dino::targets(scores, &center, sharpness.at(batch.step()));
        let targets = [target(&scores[0])?, target(&scores[1])?];
        let loss = dino::loss(&[s1?, s2?], &targets, base.student_temperature)?;
        // The next step has this center.
        let both = Tensor::cat(&scores, 0)?;
        center.set(&dino::updated_center(&center, &both, base.center_momentum)?)?;

        let mut losses = Losses {
            keys: Some((&key_encoder, &key_head)),
            frozen: (batch.step() < frozen).then_some("head.prototypes."),
            follow: Some(batch.momentum()?), // the teacher follows the student's new weights
            ..Losses::new(loss, term)        // SER: the term is added to the base loss
        };
        if run.epoch_ends() {
            // A collapse shows here first: both entropies are zero, or both are ln K.
            let entropies = Entropies::of(&Tensor::cat(&targets, 0)?)?;
            losses.figures = vec![("entropy", entropies.each), ("entropy of mean", entropies.mean)];
        }
        run.step(&batch, losses, &encoder, &mut ser, &mut state)?;
    }
    run.finish(&key_encoder, &state)
}
