//! From the tokens of a map to the tokens that are compared, without breaking their field.

use candle_core::{Module, Tensor};
use candle_nn::VarBuilder;

use crate::group::{FieldType, Representation, Subgroup};
use crate::projector::{Projector, ProjectorConfig};
use crate::{Error, Result};

/// The projector, if there is one, and how channels turn before and after it.
#[derive(Clone, Debug)]
pub(super) struct Head {
    field: FieldType,
    compared: FieldType,
    projector: Option<Projector>,
    /// Channels of one block: the projector sees one of each block at a time.
    order: usize,
}

impl Head {
    pub fn new(config: Option<ProjectorConfig>, field: FieldType, vb: VarBuilder) -> Result<Self> {
        if field.channels() == 0 {
            return Err(Error::config("channels", "a width of at least 1", 0));
        }
        let Some(config) = config else {
            return Ok(Self {
                compared: field.clone(),
                field,
                projector: None,
                order: 1,
            });
        };
        let (group, blocks) = match field.parts() {
            &[(Representation::Trivial, channels)] => (Subgroup::Trivial, channels),
            &[(Representation::Regular(group), blocks)] => {
                if blocks == 1 && config.norm {
                    return Err(Error::config(
                        "ProjectorConfig::norm",
                        "false where each group element has one channel: its norm over one value is constant",
                        config.norm,
                    ));
                }
                (group, blocks)
            }
            parts => {
                return Err(Error::config(
                    "SerConfig::projector",
                    "None for a mixed field: a projector would mix channels that turn differently",
                    format!("a projector for {parts:?}"),
                ));
            }
        };
        let projector = Projector::new(blocks, config, vb)?;
        let order = group.order();
        let compared = match field.is_trivial() {
            true => FieldType::trivial(config.out),
            false => FieldType::regular(group, order * config.out)?,
        };
        Ok(Self {
            field,
            compared,
            projector: Some(projector),
            order,
        })
    }

    /// The field of the map.
    pub fn field(&self) -> &FieldType {
        &self.field
    }

    /// The field of what [`forward`](Self::forward) returns.
    pub fn compared(&self) -> &FieldType {
        &self.compared
    }

    /// Whether tokens of both can be compared under one action; widths of trivial fields are checked where they meet.
    pub fn is_peer(&self, other: &Self) -> bool {
        let trivial = self.compared.is_trivial() && other.compared.is_trivial();
        trivial || self.compared == other.compared
    }

    /// Tokens `(B, N, C)` of a map of shape `dims`.
    pub fn forward(&self, tokens: &Tensor, dims: &[usize]) -> Result<Tensor> {
        let (b, n, c) = tokens.dims3()?;
        let channels = self.field.channels();
        if c != channels {
            return Err(Error::input(
                "SerLoss",
                format!("maps of {channels} channels"),
                format!("{c} in {dims:?}"),
            ));
        }
        let Some(projector) = &self.projector else {
            return Ok(tokens.clone());
        };
        if self.order == 1 {
            return Ok(projector.forward(tokens)?);
        }
        // One row per group element: the same head for all of them commutes with their permutation.
        let rows = tokens
            .reshape((b, n, c / self.order, self.order))?
            .transpose(2, 3)?
            .contiguous()?;
        let rows = projector.forward(&rows)?.transpose(2, 3)?;
        Ok(rows.contiguous()?.flatten_from(2)?)
    }
}
