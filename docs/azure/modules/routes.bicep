// The only ways out of the workspace's managed network: a private endpoint per store.
param workspace string
param stores array

resource home 'Microsoft.MachineLearningServices/workspaces@2024-10-01' existing = {
  name: workspace
}

@batchSize(1)
resource routes 'Microsoft.MachineLearningServices/workspaces/outboundRules@2024-10-01' = [
  for (store, i) in stores: {
    parent: home
    name: 'store-${i}' // a rule's name has at most 33 characters
    properties: {
      type: 'PrivateEndpoint'
      category: 'UserDefined'
      destination: {
        serviceResourceId: store
        subresourceTarget: 'blob'
      }
    }
  }
]
